"""What doctor and verify share: a world within a deadline, words and numbers between its ranks, a table."""

from __future__ import annotations

import faulthandler
import itertools
import os
import socket
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor

import syncbn
from syncbn._launch import Launch
from syncbn.cluster._network import network, suspicions
from syncbn.comm import Communicator


class Deadline:
    """Ends this process, with the reason, if the block is not left in time: whatever it waits in, and whatever for.

    The collectives have deadlines of their own, `patience`, which come first and say more. This is for what has none:
    hvd.init, MPI_Init. The latter keeps Python's lock, so that only a traceback can be printed, by faulthandler.

    Args:
        seconds: from entering the block on.
        launch: for the message.

    Attributes:
        doing: what the process is about, for the message.
        hints: what may be the cause, for the message.
        patience: for the collectives.
    """

    def __init__(self, seconds: float, launch: Launch) -> None:
        self.doing = "starting"
        self.hints: list[str] = []
        self.patience = timedelta(seconds=0.8 * seconds)
        self._seconds = seconds
        self._launch = launch
        self._timer = threading.Timer(0.95 * seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._timer.cancel()

    def _expire(self) -> None:
        reason = (
            f"still {self.doing} after {self._seconds:g} s (--timeout): a rank did not start, died or is out of reach; "
            "look for the first error of the other ranks, then at addresses and firewalls between the hosts"
        )
        end(self._launch, reason, *self.hints)


def end(launch: Launch, *reasons: str) -> NoReturn:
    """Print why, and end this process so that its launcher ends the job.

    Not by an exception or sys.exit: at exit MPI waits for ranks that will not come.
    """
    sys.stdout.flush()
    print(
        f"syncbn: error on rank {launch.rank} ({socket.gethostname()}): " + "\n  ".join(reasons),
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def join(launch: Launch, deadline: Deadline) -> Communicator:
    """Return the world that the launcher made; where that fails, say why and what this host suggests, and end."""
    here = network(launch, os.environ)
    if here.problem:
        end(launch, f"{here.problem}: {here.remedy()}")
    deadline.doing = f"meeting the other ranks of {launch.launcher}"
    deadline.hints = suspicions(launch, os.environ, here)
    try:
        comm = syncbn.init(timeout=deadline.patience)
    except Exception as error:  # each backend has its own
        end(launch, f"the world of {launch.size} ranks could not be made: {error}", *deadline.hints)
    deadline.hints = []  # they have met
    return comm


def gather(comm: Communicator, numbers: Tensor) -> Tensor:
    """Return every rank's `numbers` (n,), float64, as (size, n). One all-reduce; n is the same on every rank."""
    rows = torch.zeros(comm.size, numbers.numel(), dtype=torch.float64, device="cpu")
    rows[comm.rank] = numbers
    return comm.all_reduce(rows.flatten()).view_as(rows)


def exchange(comm: Communicator, text: str) -> list[str]:
    """Return every rank's `text`, in rank order. Two all-reduces: of the lengths, and of the bytes as float64."""
    mine = torch.tensor(list(text.encode()), dtype=torch.float64, device="cpu")
    lengths = gather(comm, mine.new_tensor([mine.numel()])).flatten().long().tolist()
    ends = list(itertools.accumulate(lengths))
    places = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    whole = mine.new_zeros(ends[-1])
    whole[places[comm.rank]] = mine
    numbers = comm.all_reduce(whole).to(torch.uint8).tolist()
    return [bytes(numbers[place]).decode() for place in places]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: plain text, that a broken installation can print too.

    Example:
        >>> print(table(["rank", "host"], [["0", "a"], ["12", "b"]]))
        rank  host
        0     a
        12    b
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
    return "\n".join(lines)


def plural(number: int, noun: str) -> str:
    """Return "1 rank", "2 ranks".

    Example:
        >>> plural(2, "rank")
        '2 ranks'
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
