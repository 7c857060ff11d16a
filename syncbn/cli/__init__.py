"""The command line: `python -m syncbn doctor | verify | bench | launch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from syncbn.cluster import _main as _launch

from . import _bench, _doctor, _verify


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sub-command that `argv` (else the process's arguments) names."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["launch"]:  # reads its arguments itself, those of the script among them
        _launch.main(given[1:])
    parser = argparse.ArgumentParser(prog="python -m syncbn", description="Tools of syncbn.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (_doctor, _verify, _bench):
        command.add_command(commands)
    commands.add_parser("launch", help="start a training script by torchrun, mpirun, horovodrun or srun")
    arguments = parser.parse_args(given)
    arguments.run(arguments)
