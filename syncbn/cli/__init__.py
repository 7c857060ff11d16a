"""The command line: `syncbn doctor | verify | bench | launch | install-horovod`, also as `python -m syncbn`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from syncbn import __version__
from syncbn.cluster import _main as _launch

from . import _bench, _doctor, _horovod_build, _verify


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sub-command that `argv` (else the process's arguments) names."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["launch"]:  # reads its arguments itself, those of the script among them
        _launch.main(given[1:])
    parser = argparse.ArgumentParser(prog="syncbn", description="Tools of syncbn. COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=f"syncbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (_doctor, _verify, _bench, _horovod_build):
        command.add_command(commands)
    commands.add_parser("launch", help="start a training script by torchrun, mpirun, horovodrun or srun")
    arguments = parser.parse_args(given)
    arguments.run(arguments)
