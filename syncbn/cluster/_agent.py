"""torchrun in this process, with what it lacks where a job fails.

The rendezvous, restarts and the way back of a lost host are torchrun's. Added: sentences for its exceptions; the end of
the job on all hosts, be it that their ranks wait or are done, when torchrun fails on one; a bound on the wait for a
head node that is cut off; and 5 seconds, not 30, where a rank is stopped and so deaf to SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.run import main as torchrun

from ._addresses import HOST, HostError
from ._board import Board
from ._meeting import Meeting, say

GRACE = 10  # seconds for ranks to notice by themselves what happened elsewhere, as they know it best
STOPPED = 5  # seconds for ranks to end after SIGTERM, where one is stopped
closing = threading.Event()  # torchrun has sent its ranks SIGTERM, and gives them time


def main(arguments: Sequence[str], meeting: Meeting | None, server: socket.socket | None) -> int:
    """Run torchrun to its end, on its own or as one of several; return its exit status."""
    end_stopped_ranks_soon()
    return run(arguments, None if meeting is None else Board(meeting, server))


def run(arguments: Sequence[str], board: Board | None) -> int:
    """Run torchrun; `board` where there are several hosts. They hear of it, whatever ends it here."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)
    if board is None:
        return 1 if _outcome(arguments, board) else 0
    done = threading.Event()
    try:
        board.come()
        threading.Thread(target=watch, args=(board, done), daemon=True).start()
        why = _outcome(arguments, board)
        if why:
            board.fail(why)
    except HostError:  # from `come`, which has told them
        raise
    except Exception as error:
        board.fail(f"torchrun failed on {HOST}: {error!r}")
        raise
    finally:
        done.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from srun or `watch`, too late: the status is known
        board.leave()
    return 1 if why else 0


def _stop(number: int, frame: object) -> None:
    """As torchrun does it once its ranks have started."""
    raise SignalException(f"process {os.getpid()} got signal {number}", signal.Signals(number))


def _outcome(arguments: Sequence[str], board: Board | None) -> str:
    """Run torchrun; return why it failed, "" if it did not, and say so where torchrun has not."""
    try:
        torchrun(list(arguments))
        return ""
    except ChildFailedError as error:
        error.name = " ".join(arguments[arguments.index("rank") + 1 :])
        print(error.format_msg(), file=sys.stderr, flush=True)  # type: ignore[no-untyped-call]
        return f"the job failed on {HOST}"
    except SignalException as error:
        if board is not None and (why := board.failure()):
            return why  # `watch` has said so, and sent the signal
        why = f"the job was ended by {error.sigval.name} on {HOST}"
    except (RendezvousTimeoutError, RendezvousClosedError, RendezvousConnectionError) as error:
        if board is None:
            raise
        why = board.failure() or _rendezvous_failed(error, board)
    say(f"error: {why}")
    return why


def _rendezvous_failed(error: Exception, board: Board) -> str:
    where, came = board.meeting, board.came()
    if isinstance(error, RendezvousTimeoutError) and len(came) < where.nodes:
        return (
            f"{len(came)} of {where.nodes} hosts came within {where.timeout:g} s ({', '.join(came)}): start the same "
            f"command on the others, and check that they can connect to {where.head} port {where.port}"
        )
    if isinstance(error, RendezvousTimeoutError):
        return f"a host was lost and did not come back to {HOST} within {where.timeout:g} s"
    return f"torchrun ended on another host: {error}"


def watch(board: Board, done: threading.Event) -> None:
    """End torchrun here when the job has failed elsewhere."""
    hint = time.monotonic() + 2
    while not (why := board.failure()):
        if time.monotonic() > hint:
            hint = float("inf")
            with suppress(DistError):  # `failure` will say so
                if len(came := board.came()) < board.meeting.nodes:
                    say(f"waiting for other hosts, {board.meeting.timeout:g} s at most: {', '.join(came)} came")
        if done.wait(1):
            return
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if done.wait(0.2):
            return
        if not ranks():  # torchrun may be about to say why
            deadline = min(deadline, time.monotonic() + 2)
    say(f"error: {why}: ending it on {HOST}")
    end(done)


def end(done: threading.Event) -> None:
    """End torchrun here: by SIGTERM, which it passes on, or without it where it waits for a host that is gone."""
    if not closing.is_set():  # a second one would cut short what the first has begun
        os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + (2 * STOPPED if ranks() else 1)
    while not done.wait(0.2):
        if closing.is_set():
            deadline = max(deadline, time.monotonic() + 2)
        if time.monotonic() > deadline:
            for rank in ranks():
                os.kill(rank, signal.SIGKILL)
            os._exit(1)


def ranks(states: str = "") -> list[int]:
    """Return the processes that torchrun has started and that live; of these, those in one of `states`, as ps has them.

    Where torchrun hangs it does not bury the dead.
    """
    proc = Path("/proc")
    try:
        threads = [thread.read_text() for thread in proc.glob("self/task/*/children")]
        children = " ".join(threads).split()
        state = {int(child): (proc / child / "stat").read_text().rpartition(") ")[2][0] for child in children}
    except OSError:  # one of them has ended just now
        return ranks(states)
    return [child for child in state if state[child] != "Z" and state[child] in (states or state[child])]


def end_stopped_ranks_soon() -> None:
    """Shorten the wait for ranks after SIGTERM where one is stopped.

    After a failure torch 2.13 waits 30 s, whatever --shutdown-timeout. A rank that saves a checkpoint first may need
    them; a stopped one does nothing, and the others no longer train.
    """
    close = SubprocessContext.close

    def sooner(self: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        closing.set()
        try:
            close(self, death_sig, min(timeout, STOPPED) if ranks("T") else timeout)
        finally:
            closing.clear()

    SubprocessContext.close = sooner  # type: ignore[method-assign]
