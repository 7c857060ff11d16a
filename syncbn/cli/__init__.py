"""The command line: `python -m syncbn doctor | verify | bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import _bench, _doctor, _verify


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sub-command that `argv` (else the process's arguments) names."""
    parser = argparse.ArgumentParser(prog="python -m syncbn", description="Tools of syncbn.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (_doctor, _verify, _bench):
        command.add_command(commands)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
