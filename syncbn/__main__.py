"""`python -m syncbn`: the command line."""

from .cli import main

main()
