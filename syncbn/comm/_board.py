"""A board on which each rank writes where it is and reads where the others are: a torch store."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ._place import place
from ._protocol import BaseCommunicator, log
from ._whereabouts import Whereabouts, fate

T = TypeVar("T")
SECONDS = 5.0  # for an answer
PLACE = place("watchdog")
_torch: Any = dist  # has no types for its stores


class Board:
    """A torch store, as one rank uses it. It may end before this process does: then `lost` says so.

    Writing is one message that nobody answers. Whoever reads waits for an answer, and torch's store has no limit for
    that where the process that serves it is stopped: hence a thread for each question, which is left behind then.

    Args:
        store: with a connection of its own.
        rank: of this process.
        size: number of ranks.
        server: who serves the store.
        line: a connection to it that nobody writes to, closed with it; None where this process serves. Of a store that
            is gone, torch prints a stack trace at each request.
    """

    def __init__(
        self, store: Any, rank: int, size: int, server: Whereabouts, line: socket.socket | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.lost = ""
        self._store = store
        self._server = server
        self._line = line
        self._written: set[int] = set()  # ranks that have written
        self._ask(lambda: store.compare_set("table", "", "0"))

    def write(self, told: Whereabouts) -> None:
        """Write where this rank is."""
        if self._is_there():
            try:
                self._store.set(f"rank {self.rank}", json.dumps(told))
            except RuntimeError as error:
                self._lose(str(error))

    def read(self) -> list[Whereabouts]:
        """Return what each rank wrote last; {} for one that never did, or if the board is lost."""

        def ask() -> list[bytes]:
            for rank in range(self.size):
                if rank not in self._written and self._store.check([f"rank {rank}"]):  # reading would wait for it
                    self._written.add(rank)
            written = sorted(self._written)
            texts = self._store.multi_get([f"rank {rank}" for rank in written])
            told = dict(zip(written, texts, strict=True))
            return [told.get(rank, b"{}") for rank in range(self.size)]

        return [json.loads(text) for text in self._ask(ask) or [b"{}"] * self.size]

    def last_table(self) -> str:
        """Return which table was printed last in this job; "" if the board is lost."""
        return (self._ask(lambda: self._store.get("table")) or b"").decode()

    def claim_table(self, last: str) -> bool:
        """Tell whether this rank is the one to print the table that follows `last`; also if the board is lost."""
        mine = f"{secrets.token_hex(4)} by rank {self.rank}"
        return (self._ask(lambda: self._store.compare_set("table", last, mine)) or mine.encode()) == mine.encode()

    def close(self) -> None:
        """Use the board no more."""
        self.lost = self.lost or "the watchdog has ended"
        if self._line is not None:
            self._line.close()

    def _ask(self, question: Callable[[], T]) -> T | None:
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question())
            except RuntimeError as error:
                self._lose(str(error))

        if self._is_there():
            thread = threading.Thread(target=ask, name="syncbn question", daemon=True)
            thread.start()
            thread.join(SECONDS)
            if not answers:
                self._lose(f"no answer within {SECONDS:g} s")
        return answers[0] if answers else None

    def _is_there(self) -> bool:
        if self._line is not None and not self.lost:
            try:
                self._line.recv(1)
            except BlockingIOError:  # nothing has happened: nobody sends anything
                return True
            except OSError:
                pass
            self._lose("it has closed its connections")
        return not self.lost

    def _lose(self, reason: str) -> None:
        if not self.lost:
            known = fate(self._server) if "pid" in self._server else ""
            self.lost = f"{self._server['name']}, which serves the watchdog's store, does not answer"
            self.lost += f": it is {known}" if known else ""
            log.info("the watchdog sees this rank alone: %s (%s)", self.lost, reason.splitlines()[0])


def of_torch(comm: BaseCommunicator, device: str) -> Board | None:
    """Return a board in the store of torch.distributed's world, `comm`; None if that store is no TCPStore.

    One sum, of a number on `device`, by which rank 0 names it: ranks that were in other worlds before share the store,
    but no count of them.
    """
    world: Any = _torch.distributed_c10d._get_default_store()
    beneath = world
    while isinstance(beneath, _torch.PrefixStore):
        beneath = beneath.underlying_store
    if not isinstance(beneath, _torch.TCPStore):
        return None
    name = torch.zeros(1, dtype=torch.float64, device="cpu")
    if comm.rank == 0:
        name[0] = secrets.randbits(53)  # exact in float64
    name = comm.all_reduce(name.to(device), PLACE)
    store = _torch.PrefixStore(f"syncbn watchdog {int(name.item())}", world)
    server = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    # A connection of its own: on torch's, it waits while torch waits. Older ones cannot have another.
    store = store.clone() if hasattr(store, "clone") else store
    return Board(store, comm.rank, comm.size, {"name": server}, line_to(beneath.host, beneath.port))


def line_to(address: str, port: int) -> socket.socket | None:
    """Return a connection for `Board`; None if that cannot be had."""
    try:
        line = socket.create_connection((address, port), timeout=SECONDS)
    except OSError:
        return None
    line.setblocking(False)
    return line
