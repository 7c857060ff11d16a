"""The watchdog: says where every rank is when one waits too long, and ends a wait that cannot end well.

A thread in each process writes once a second where the process is, on a board that all ranks read (`_board`), and looks
at its communicators. While no sum takes longer than a second that is all: no rank reads. It sees Python: what NCCL's
kernels wait for, torch's flight recorder knows (TORCH_NCCL_TRACE_BUFFER_SIZE=2000, TORCH_NCCL_DUMP_ON_TIMEOUT=1), and
which tensors Horovod's ranks have not handed in, its stall inspector (HOROVOD_STALL_CHECK_TIME_SECONDS).
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch

from syncbn.errors import InputError, SyncBatchNormError

from . import _protocol
from ._board import Board, of_torch
from ._diagnosis import describe, is_lost, judge
from ._distributed import TorchDistributed
from ._protocol import BaseCommunicator, log
from ._served_board import served
from ._whereabouts import Sums, Whereabouts, identity

_VARIABLE = "SYNCBN_WATCHDOG"
_DEFAULT = 60.0
_PERIOD = 1.0  # seconds between two looks
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.0)  # between looks at a rank; one that has not written in all of them does not run
_OFF = timedelta(0)


def threshold(given: timedelta | None, timeout: timedelta) -> float:
    """Return after how many seconds of waiting a rank says so; 0: never, no watchdog.

    Args:
        given: by `syncbn.init(watchdog=)`; None leaves it to SYNCBN_WATCHDOG, in seconds, and else to the default,
            60 s, or half of a `timeout` below that.
        timeout: when a wait ends as an error.

    Raises:
        InputError: the threshold is no number of seconds, negative, or not below the timeout.
    """
    limit = timeout.total_seconds()
    text = os.environ.get(_VARIABLE, "")
    if given is None and not text:
        return _DEFAULT if limit > _DEFAULT else limit / 2
    what = f"{_VARIABLE}={text}" if given is None else f"init(watchdog={given!r})"
    if not isinstance(given, timedelta | None):
        raise InputError(f"{what}: expected a datetime.timedelta, timedelta(0) for no watchdog")
    try:
        seconds = float(text) if given is None else given.total_seconds()
    except ValueError:
        raise InputError(f"{what}: expected a number of seconds, 0 for no watchdog") from None
    if not 0 <= seconds < limit:
        raise InputError(
            f"{what}: expected 0, for no watchdog, or less than the timeout of {limit:g} s, which ends a wait as an "
            "error: give a shorter one, or init(timeout=) a longer"
        )
    return seconds


class Watchdog(threading.Thread):
    """Looks at this process's communicators once a second, until `comm`, its world, is about to close.

    Args:
        comm: the world.
        board: of its ranks.
        seconds: `threshold`.
    """

    def __init__(self, comm: BaseCommunicator, board: Board, seconds: float) -> None:
        super().__init__(name="syncbn watchdog", daemon=True)
        self._comm = weakref.ref(comm)
        self.board = board
        self._threshold = seconds
        self._sums = Sums()
        self._ended = threading.Event()
        self._last_words = ""
        self._beats = itertools.count()
        self._next = seconds  # when to say something
        self._last_table = ""  # at the start of the wait
        self._nothing = [Whereabouts()] * board.size
        self._before = self._nothing  # what the ranks had written a look ago, while this one waits
        self._write()

    def run(self) -> None:
        """Look, until the world or the process ends."""
        while not self._ended.wait(_PERIOD):
            contained(self._look)
        contained(lambda: self._write(ended=self._last_words))
        self.board.close()

    def watches(self, comm: BaseCommunicator) -> bool:
        """Tell whether it looks on for the world `comm`."""
        return self.is_alive() and self._comm() is comm

    def knows(self, comm: BaseCommunicator) -> bool:
        """Tell whether the ranks of `comm` are on the board, `comm.members` by its numbers: not so of another kind."""
        return type(comm) is type(self._comm())

    def end(self, words: str) -> None:
        """End; the other ranks read these `words`."""
        self._last_words = words
        self._ended.set()
        if threading.current_thread() is not self:
            self.join(_PERIOD)

    def _write(self, **more: str) -> None:
        self.board.write({**identity(), **self._sums.tell(), "beat": next(self._beats), **more})

    def _look(self) -> None:
        self._sums.look()
        self._write()
        if self._sums.waiting is not None:
            self._wait(self._sums.waiting, self._sums.ticks)

    def _wait(self, comm: BaseCommunicator, ticks: int) -> None:
        """This rank has waited in one sum of `comm` for so many looks."""
        if ticks == 1:
            self._next, self._before = self._threshold, self._nothing
            self._last_table = self.board.last_table()
        if comm.members is not None and self.knows(comm) and ticks % max(1, self.board.size // 64) == 0:
            now = self.board.read()
            comm.verdict = judge([now[rank] for rank in comm.members], [self._before[rank] for rank in comm.members])
            self._before = now
        if ticks * _PERIOD >= self._next:
            self._next *= 2
            self._say(f"{ticks * _PERIOD:g}")

    def _say(self, seconds: str) -> None:
        _print(f"in {self._sums.call}: rank {self.board.rank} of {self.board.size} has waited {seconds} s")
        first = self.board.claim_table(self._last_table)
        self._last_table = self.board.last_table()
        if first:
            threading.Thread(target=contained, args=[self._print_table], name="syncbn table", daemon=True).start()

    def _print_table(self) -> None:
        told, silent = self._listen(lambda _: False)
        lines = [self.board.lost] if self.board.lost else describe(told, silent, range(len(told)))
        _print("\n  ".join(["where every rank is", *lines]))

    def culprits(self) -> str:
        """Return what is known of the ranks that are lost, for an error; where none is, of all others.

        At once, or as soon as one is lost, or all have written since, or one has not for two seconds and a half.
        """
        told, silent = self._listen(lost_among)
        ranks = lost_among(told) or [rank for rank in range(len(told)) if rank != self.board.rank]
        lines = [self.board.lost] if self.board.lost else describe(told, silent, ranks)
        return "".join(f"\n  {line}" for line in lines)

    def _listen(self, enough: Callable[[list[Whereabouts]], object]) -> tuple[list[Whereabouts], list[bool]]:
        """Return what each rank wrote, and whether it has stopped to; early where that is `enough`, or all go on."""
        before = told = self.board.read()
        silent = [bool(where) and "ended" not in where for where in told]
        for pause in _PAUSES:
            if self.board.lost or enough(told) or not any(silent):
                break
            time.sleep(pause)
            told = self.board.read()
            silent = [
                waits and now.get("beat") == then.get("beat")
                for waits, now, then in zip(silent, told, before, strict=True)
            ]
        return told, silent


def lost_among(told: list[Whereabouts]) -> list[int]:
    """Return the ranks that are lost."""
    return [rank for rank, where in enumerate(told) if where and is_lost(where)]


def contained(act: Callable[[], object]) -> None:
    """Act; what fails in the watchdog (a closed stderr, no memory for a thread) does not end the job."""
    try:
        act()
    except Exception as error:
        log.debug("the watchdog: %r", error, exc_info=True)


def _ending() -> str:
    error = getattr(sys, "last_value", None)  # of the exception that ended the script
    return "has come to its end, or sys.exit" if error is None else f"has ended with {type(error).__name__}: {error}"


def _print(text: str) -> None:
    sys.stderr.write(f"syncbn watchdog: {text}\n")  # in one piece
    sys.stderr.flush()


_running: Watchdog | None = None


def start(comm: BaseCommunicator, seconds: float) -> None:
    """Start the watchdog of the world `comm`, on each of its ranks; does nothing where one runs, or is not wanted.

    Raises:
        LaunchError: the board cannot be reached; on every rank.
    """
    global _running
    if seconds == 0 or comm.size == 1 or (_running is not None and _running.watches(comm)):
        return
    try:
        if isinstance(comm, TorchDistributed):
            board = of_torch(comm, "cpu" if comm.takes(torch.device("cpu")) else "cuda")
        else:
            board = served(comm)
        if board is not None:
            _running = Watchdog(comm, board, seconds)
            _running.start()
    except SyncBatchNormError:  # told by sums, so every rank has it
        raise
    except Exception as error:
        log.debug("this rank has no watchdog: %r", error, exc_info=True)
    # The last to be registered runs first: before whatever ends the world at exit, and would be taken for the end.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def _witness(comm: BaseCommunicator) -> str:
    known: list[str] = []
    if _running is not None and _running.knows(comm):
        contained(lambda: known.append(_running.culprits()))
    return "".join(known)


def _at_end(comm: BaseCommunicator) -> None:
    global _running
    if _running is not None and _running.watches(comm):
        _running.end("has closed the world")
        _running = None


def _at_exit() -> None:
    if _running is not None and _running.is_alive():
        _running.end(_ending())


def _in_child() -> None:
    global _running
    if _running is not None:
        _left_to_the_parent.append(_running)  # its store's threads are not here to be joined
    _running = None


_left_to_the_parent: list[Watchdog] = []
_protocol.witnesses.append(_witness)
_protocol.on_end.append(_at_end)
os.register_at_fork(after_in_child=_in_child)
