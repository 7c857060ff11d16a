"""Command lines: a dataclass says which options there are, `parse` reads them into it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ._addresses import HostError

T = TypeVar("T", bound="Options")
WAIT = "how long to wait for the other hosts (300)"


def option(help: str, default: Any = MISSING, *, metavar: str = "", convert: Callable[[str], Any] = str) -> Any:
    """Return the field of an option: a flag where the default is False."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "convert": convert})


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number, not below `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a number of {least} or more, got {text!r}")
        return int(text)

    return number


def port(text: str) -> int:
    """Read a port that a user may listen at."""
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1024 to 65535, got {text!r}")
    return int(text)


def ranks_by_host(text: str) -> Mapping[str, int]:
    """Read HOST:N,HOST:N,...

    Example:
        >>> ranks_by_host("node1:2,node2:4")
        {'node1': 2, 'node2': 4}
    """
    ranks: dict[str, int] = {}
    for part in text.split(","):
        host, _, count = part.partition(":")
        if not host or host.startswith("-") or not count.isdecimal() or int(count) < 1 or host in ranks:
            raise argparse.ArgumentTypeError(f"expected HOST:N,HOST:N,... with each host once, got {text!r}")
        ranks[host] = int(count)
    return ranks


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every launcher is told, beside what it alone is.

    Attributes:
        script: a Python script, or -m and a module, and its arguments.
    """

    script: tuple[str, ...]
    interface: str = option(
        "network interface between the hosts; else the one that the route to the head node takes", "", metavar="NAME"
    )
    dry_run: bool = option("print the command and stop; no process is started on any host", False)


@dataclass(frozen=True, kw_only=True)
class JobOptions(Options):
    """And every one that starts a whole job."""

    preflight: bool = option(
        "first run `syncbn doctor` as the same job, and start the script only if all is well", False
    )


def parse(kind: type[T], prog: str, description: str, arguments: Sequence[str], epilog: str = "") -> T:
    """Read a command line: options, then the script with its arguments, best after --.

    Ends the process with status 2, and says why, where an option is unknown, missing or has no such value.

    Raises:
        HostError: there is no such script.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [OPTION ...] -- SCRIPT [ARGUMENT ...]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = {f"--{spec.name.replace('_', '-')}": spec for spec in fields(kind) if spec.name != "script"}
    for name, spec in known.items():
        _add(parser, name, spec)
    flags = {"-h", "--help", *(name for name, spec in known.items() if spec.default is False)}
    ours, script = _split(arguments, flags)
    values = vars(parser.parse_args(ours))
    if not script:
        parser.error("no script: expected -- SCRIPT [ARGUMENT ...] after the options")
    if script[0] != "-m" and not Path(script[0]).is_file():
        raise HostError(f"no such script: {script[0]!r} (looked in {Path.cwd()})")
    return kind(script=tuple(script), **values)


def _add(parser: argparse.ArgumentParser, name: str, spec: Field[Any]) -> None:
    if spec.default is False:
        parser.add_argument(name, action="store_true", help=spec.metadata["help"])
    else:
        required = spec.default is MISSING
        parser.add_argument(
            name,
            default=None if required else spec.default,
            required=required,
            metavar=spec.metadata["metavar"],
            type=spec.metadata["convert"],
            help=spec.metadata["help"],
        )


def _split(arguments: Sequence[str], flags: set[str]) -> tuple[list[str], list[str]]:
    """Tell our options from the script, which begins after --, or where an option would begin but none does."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-") and arguments[place] not in ("--", "-m"):
        place += 1 if arguments[place] in flags or "=" in arguments[place] else 2
    ours, rest = list(arguments[:place]), list(arguments[place:])
    return ours, rest[1:] if rest[:1] == ["--"] else rest
