"""A board for launchers that bring no torch store: rank 0 serves one."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import LaunchError

from ._board import PLACE, SECONDS, Board, line_to
from ._hosts import hosts
from ._protocol import BaseCommunicator, log
from ._verdict import named
from ._whereabouts import Whereabouts, identity

_torch: Any = dist  # has no types for its stores


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
    ranks = [rank for rank, no in enumerate(comm.all_reduce(failed, PLACE).tolist()) if no]
    if store is None or ranks:
        where = f"{' or '.join(told['addresses'])}, port {told['port']}" if told else "no address"
        raise LaunchError(
            f"{named(ranks)} of {comm.size} cannot reach the watchdog's store, which rank 0 serves at {where}: let the "
            "hosts of the job connect to one another, or do without: SYNCBN_WATCHDOG=0, or "
            "syncbn.init(watchdog=timedelta(0))"
        )
    return Board(store, comm.rank, comm.size, told["server"], line)


_LONGEST = 1000  # bytes that rank 0 tells


def _tell(comm: BaseCommunicator, text: str) -> str:
    """Return the text of rank 0; one sum."""
    told = torch.zeros(_LONGEST, dtype=torch.float64, device="cpu")
    if comm.rank == 0:
        told[: len(text)] = torch.tensor(list(text.encode()), dtype=torch.float64, device="cpu")
    total: Tensor = comm.all_reduce(told, PLACE)
    return bytes(total.to(torch.uint8).tolist()).rstrip(b"\0").decode()


def _serve(addresses: Sequence[str], size: int) -> tuple[Any, Whereabouts]:
    """Return a store, and what others need to find it; None and {} if that fails."""
    if not addresses:
        log.warning("the watchdog's store cannot be served: this host has no IPv4 address but the loopback's")
        return None, {}
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


_LIMIT = {"timeout": timedelta(seconds=SECONDS)}


def _connect(told: Whereabouts) -> tuple[Any, socket.socket | None]:
    """Return the store that `told` describes, and a line to it; or None, None."""
    for address in told.get("addresses", ()):
        line = line_to(address, told["port"])
        if line is None:
            continue
        try:
            store = _torch.TCPStore(address, told["port"], is_master=False, wait_for_workers=False, **_LIMIT)
            if store.check([told["secret"]]):  # an address such as Docker's may be another host's, too
                return store, line
        except RuntimeError:
            pass
        line.close()
    return None, None


def _addresses() -> list[str]:
    """Return the IPv4 addresses by which other hosts may reach this one."""
    from ..cluster._addresses import outer_interfaces  # of POSIX systems alone

    return [interface.address for interface in outer_interfaces()]
