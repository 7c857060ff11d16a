"""Where this process is, for the other ranks to read; and what a process of this host does that does not answer."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from . import _verdict
from ._place import Call
from ._protocol import BaseCommunicator, by_key

Whereabouts = dict[str, Any]  # as JSON


def identity() -> Whereabouts:
    """Return where this process runs: what `fate` needs to look for it."""
    return {"host": socket.gethostname(), "space": _pid_space(), "pid": os.getpid()}


def _pid_space() -> str:  # containers of one host may share its name, but not their process numbers
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def fate(of: Whereabouts) -> str:
    """Say what the system knows of a process: "gone", "stopped", "alive"; "" where it is of another host."""
    mine = identity()
    if not mine["space"] or any(of[name] != mine[name] for name in ("host", "space")):
        return ""
    try:
        state = Path(f"/proc/{of['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "alive")


class Sums:
    """The sums of this process as seen from tick to tick: what it waits for, and the last that it made."""

    def __init__(self) -> None:
        self.waiting: BaseCommunicator | None = None  # open, and in the call of the tick before
        self._current: BaseCommunicator | None = None  # in a call, or it gave that up
        self.ticks = 0  # for how many; not a time: who was stopped meanwhile has not waited
        self.call: Call | None = None  # that it waits for
        self._last = ""
        self._seen: dict[str, tuple[Any, Any]] = {}  # by key: `call` and `last` of the tick before

    def look(self) -> None:
        """Look at every communicator."""
        before, self._seen = self._seen, {}
        current: dict[bool, BaseCommunicator] = {}  # by whether its call is that of the tick before
        for reference in by_key.valuerefs():  # by one operation: other threads make communicators
            comm = reference()
            if comm is None or comm.state == "closed":
                continue
            call, last = self._seen[comm.key] = comm.call, comm.last
            waited_for, made = before.get(comm.key, (None, None))
            if last is not made:
                self._last = str(last)
            if call is not None:  # the outermost: it was made before those that it uses
                current.setdefault(call is waited_for and comm.state == "open", comm)
        self.waiting = current.get(True)
        self._current = self.waiting or current.get(False)
        call = None if self.waiting is None else self._seen[self.waiting.key][0]
        self.ticks = self.ticks + 1 if call is self.call else 1
        self.call = call

    def tell(self) -> Whereabouts:
        """Return what other ranks ask for: the sum that this one is in, or the line that it is at."""
        told: Whereabouts = {"last": self._last, "row": None}
        comm = self._current
        call, vector = (None, None) if comm is None else (comm.call, comm.vector)
        if comm is not None and call is not None and vector is not None:
            told["row"] = _verdict.row(call, vector)
            told["open"] = comm.state == "open"
            told["members"] = None if comm.members is None else list(comm.members)
        told["line"] = line(of_libraries=told["row"] is None)
        return told


_OURS = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})


def line(*, of_libraries: bool) -> str:
    """Return the innermost line of the main thread that is the program's own; of the libraries, too, if wanted.

    Example:
        >>> line(of_libraries=True)  # doctest: +ELLIPSIS
        '...'
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost, own = _first(frame, (_OURS,)), _first(frame, (_OURS, *_LIBRARIES, "<frozen"))
    lines = [own] if own is innermost or not of_libraries else [innermost, own]
    return ", from ".join(_text(found) for found in lines if found is not None) or "no Python code"


def _first(frame: FrameType | None, but: Sequence[str]) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename.startswith(tuple(but)):
        frame = frame.f_back
    return frame


def _text(frame: FrameType) -> str:
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
