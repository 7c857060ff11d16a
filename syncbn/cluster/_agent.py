"""torchrun in this process, with what it lacks where a job fails.

torchrun's rendezvous, its restarts and the way back of a lost host are its own. Added are: sentences for its
exceptions; the end of the job on all hosts, be it that their ranks wait or are done, when torchrun fails on one; a bound
on the wait for a head node that is cut off; 5 seconds, not 30, for a rank that is stopped and ignores SIGTERM; and the
end of the ranks with their torchrun.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import main as torchrun

from ._addresses import HOST
from ._board import Board, Meeting, say

GRACE = 10  # seconds for ranks to notice by themselves what happened elsewhere, as they know it best
STOPPED = 5  # seconds for a rank to end after SIGTERM


def main(arguments: Sequence[str]) -> int:
    """Meet, then run torchrun to its end; return its exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option, kind in {"--head": str, "--port": int, "--nodes": int, "--timeout": float, "--address": str}.items():
        parser.add_argument(option, type=kind)
    parser.add_argument("--is-head", action="store_true")
    place = list(arguments).index("--")
    where = parser.parse_args(arguments[:place])
    end_stopped_ranks_soon()
    board = Board(Meeting(**vars(where))) if where.head else None
    return run(arguments[place + 1 :], board)


def run(arguments: Sequence[str], board: Board | None) -> int:
    """Run torchrun; `board` where there are several hosts."""
    done = threading.Event()
    why = ""
    try:
        if board is not None:
            board.come()
            threading.Thread(target=watch, args=(board, done), daemon=True).start()
        why = _outcome(arguments, board)
    finally:
        done.set()
        if board is not None:
            if why:
                board.fail(why)
            board.leave()
    return 1 if why else 0


def _outcome(arguments: Sequence[str], board: Board | None) -> str:
    """Run torchrun; return why it failed, "" if it did not, and say so where torchrun has not."""
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        error.name = " ".join(arguments[arguments.index("rank") + 1 :])
        print(error.format_msg(), file=sys.stderr, flush=True)
        return f"the job failed on {HOST}"
    except SignalException as error:
        say(f"ended by {error.sigval.name}")
        return f"the job was ended on {HOST} ({error.sigval.name})" if "--max-restarts=0" in arguments else ""
    except (RendezvousTimeoutError, RendezvousClosedError, RendezvousConnectionError) as error:
        assert board is not None
        why = board.failure() or _rendezvous(error, board)
        say(f"error: {why}")
        return why
    return ""


def _rendezvous(error: Exception, board: Board) -> str:
    if isinstance(error, RendezvousTimeoutError):
        remedy = "start the same command on the others, and check that they can connect to the head node"
        return f"{board.missing() or 'not all hosts came again'} within the timeout: {remedy}"
    return f"{HOST} was left alone: {error}"


def watch(board: Board, done: threading.Event) -> None:
    """End torchrun here when the job has failed elsewhere."""
    began, told = time.monotonic(), False
    while not (why := board.failure()):
        if not told and time.monotonic() - began > 2:
            told = True
            if missing := board.missing():
                say(f"{missing} yet; waiting for the others")
        if done.wait(1):
            return
    deadline = time.monotonic() + GRACE
    while ranks() and time.monotonic() < deadline:
        if done.wait(0.2):
            return
    say(f"error: {why}: ending it on {HOST}")
    left = ranks()
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes it on
    if not done.wait(2 * STOPPED if left else 1):  # it waits for a host that is gone, deaf to signals
        for rank in ranks():
            os.kill(rank, signal.SIGKILL)
        os._exit(1)


def ranks() -> list[int]:
    """Return the processes that torchrun has started and that live; where it hangs it does not bury the dead."""
    proc = Path("/proc")
    try:
        threads = [thread.read_text() for thread in proc.glob("self/task/*/children")]
        children = " ".join(threads).split()
        return [int(child) for child in children if ") Z " not in (proc / child / "stat").read_text()]
    except OSError:  # one of them has ended just now
        return ranks()


def end_stopped_ranks_soon() -> None:
    """Shorten the wait for ranks after SIGTERM. torch 2.13 has --shutdown-timeout, but where a rank fails it takes 30."""
    close = SubprocessContext.close

    def sooner(self: Any, death_sig: signal.Signals | None = None, timeout: int = STOPPED) -> None:
        close(self, death_sig, min(timeout, STOPPED))

    SubprocessContext.close = sooner  # type: ignore[method-assign]
