"""A board on which each rank writes where it is and reads where the others are: a torch store."""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import LaunchError

from ._hosts import hosts
from ._place import place
from ._protocol import BaseCommunicator, log
from ._verdict import named
from ._whereabouts import Whereabouts, fate, identity

T = TypeVar("T")
_SECONDS = 5.0  # for an answer
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
            thread.join(_SECONDS)
            if not answers:
                self._lose(f"no answer within {_SECONDS:g} s")
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


def of_torch(rank: int, size: int, number: int) -> Board | None:
    """Return a board in the store of torch.distributed's world, of that `number`; None if that store is no TCPStore."""
    world: Any = _torch.distributed_c10d._get_default_store()
    beneath = world
    while isinstance(beneath, _torch.PrefixStore):
        beneath = beneath.underlying_store
    if not isinstance(beneath, _torch.TCPStore):
        return None
    store = _torch.PrefixStore(f"syncbn watchdog {number}", world)
    server = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    # A connection of its own: on torch's, it waits while torch waits. Older ones cannot have another.
    store = store.clone() if hasattr(store, "clone") else store
    return Board(store, rank, size, {"name": server}, _line_to(beneath.host, beneath.port))


def served(comm: BaseCommunicator) -> Board:
    """Return a board that rank 0 of `comm` serves, on a free port; on every rank, or an error on every rank.

    Three sums. Where all ranks share a host, no other can connect.

    Raises:
        LaunchError: a rank cannot reach it.
    """
    alone = len(hosts(comm)) == 1
    store, line, told = None, None, Whereabouts()
    if comm.rank == 0:
        store, told = _serve(["127.0.0.1"] if alone else _addresses(), comm.size)
    told = json.loads(_tell(comm, json.dumps(told)))
    if comm.rank > 0:
        store, line = _connect(told)
    failed = torch.zeros(comm.size, dtype=torch.float64, device="cpu")
    failed[comm.rank] = store is None
    ranks = [rank for rank, no in enumerate(comm.all_reduce(failed, _PLACE).tolist()) if no]
    if store is None or ranks:
        where = f"{' or '.join(told['addresses'])}, port {told['port']}" if told else "no address"
        raise LaunchError(
            f"{named(ranks)} of {comm.size} cannot reach the watchdog's store, which rank 0 serves at {where}: let the "
            "hosts of the job connect to one another, or do without: SYNCBN_WATCHDOG=0, or "
            "syncbn.init(watchdog=timedelta(0))"
        )
    return Board(store, comm.rank, comm.size, told["server"], line)


_PLACE = place("watchdog")
_LONGEST = 1000  # bytes that rank 0 tells


def _tell(comm: BaseCommunicator, text: str) -> str:
    """Return the text of rank 0; one sum."""
    told = torch.zeros(_LONGEST, dtype=torch.float64, device="cpu")
    if comm.rank == 0:
        told[: len(text)] = torch.tensor(list(text.encode()), dtype=torch.float64, device="cpu")
    total: Tensor = comm.all_reduce(told, _PLACE)
    return bytes(total.to(torch.uint8).tolist()).rstrip(b"\0").decode()


def _serve(addresses: Sequence[str], size: int) -> tuple[Any, Whereabouts]:
    """Return a store, and what others need to find it; None and {} if that fails."""
    try:
        where = addresses[0] if addresses == ["127.0.0.1"] else ""
        listening = socket.create_server((where, 0), backlog=size)
        port, secret = listening.getsockname()[1], secrets.token_hex(8)
        store = _torch.TCPStore(
            addresses[0], port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(), **_LIMIT
        )
        store.set(secret, "")
    except (OSError, RuntimeError) as error:
        log.warning("the watchdog's store cannot be served: %s", error)
        return None, {}
    server = {"name": "rank 0", **identity()}
    return store, {"port": port, "secret": secret, "addresses": addresses[:16], "server": server}


_LIMIT = {"timeout": timedelta(seconds=_SECONDS)}


def _connect(told: Whereabouts) -> tuple[Any, socket.socket | None]:
    """Return the store that `told` describes, and a line to it; or None, None."""
    for address in told.get("addresses", ()):
        line = _line_to(address, told["port"])
        if line is None:
            continue
        try:
            store = _torch.TCPStore(address, told["port"], is_master=False, wait_for_workers=False, **_LIMIT)
            if store.check([told["secret"]]):  # an address such as Docker's may be another host's, too
                return store, line
        except RuntimeError:
            line.close()
    return None, None


def _line_to(address: str, port: int) -> socket.socket | None:
    try:
        line = socket.create_connection((address, port), timeout=_SECONDS)
    except OSError:
        return None
    line.setblocking(False)
    return line


def _addresses() -> list[str]:
    """Return this host's IPv4 addresses, but the loopback's."""
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:  # SIOCGIFADDR
                answer = fcntl.ioctl(any_socket.fileno(), 0x8915, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]
