"""Which ranks share a host, and the sum in two levels that follows from it."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor

from syncbn.errors import BackendError

from ._pairs import Pairs
from ._protocol import BaseCommunicator, Communicator, log
from ._shared_memory import AVAILABLE, SharedMemory
from ._verdict import OTHER_VECTOR


def hosts(comm: Communicator, *, device: str = "cpu", apart: bool = False) -> list[list[int]]:
    """Divide the ranks of `comm` by host name, in the order of each host's first rank. One all-reduce of `size`.

    Args:
        comm: the ranks.
        device: where its tensors must be.
        apart: count this rank as a host of its own.
    """
    names = torch.zeros(comm.size, dtype=torch.float64, device=device)
    names[comm.rank] = -1 - comm.rank if apart else zlib.crc32(socket.gethostname().encode())  # exact in float64
    by_host: dict[float, list[int]] = {}
    for rank, name in enumerate(comm.all_reduce(names).tolist()):
        by_host.setdefault(name, []).append(rank)
    return list(by_host.values())


class TwoLevel(BaseCommunicator):
    """Sum within each host, then between the hosts' first ranks, and hand the result back within each host."""

    def __init__(self, over: Communicator, within: SharedMemory, between: Pairs | None) -> None:
        super().__init__(over.rank, over.size)
        self._within = within
        self._between = between  # None on all but the first rank of each host
        self.transport = f"shared memory within hosts, {getattr(over, 'transport', 'another')} between"

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        x, seen = self._within._sum(x, signature)
        if self._between is not None:
            x, seen = self._between.sum(x, signature, seen)
        elif seen != OTHER_VECTOR:
            x.zero_()
        # A sum with zeros: every rank gets the first rank's bits. The verdict of all hosts comes as a disagreement with
        # the first rank: about what is sent, or about its length.
        sent = x.flatten()[:0] if seen == OTHER_VECTOR and self._between is not None else x
        seconds = 2 * self._within.seconds  # the first rank waits between the hosts, and knows more
        _, last = self._within.sum(sent, seen, seconds)
        return x, max(seen, last)

    def _give_up(self) -> None:
        self._within._give_up()

    def _release(self) -> None:
        self._within.close()


def by_hosts(plain: BaseCommunicator, between: Callable[[list[int]], Pairs], timeout: timedelta) -> BaseCommunicator:
    """Return the fastest way to add CPU tensors over the ranks of `plain`, which is `plain` where no two share a host.

    Collective over `plain`. `SYNCBN_SHARED_MEMORY=0`, or a missing compiled module, sets a rank apart: the ranks need
    not agree on either. Where memory cannot be had, rank 0 logs a warning and all ranks use `plain`.

    Args:
        plain: the backend's own communicator.
        between: `between(ranks)` makes the communicator of these ranks, on them only.
        timeout: of a wait in shared memory.
    """
    parts = hosts(plain, apart=not AVAILABLE or os.environ.get("SYNCBN_SHARED_MEMORY") == "0")
    if len(parts) == plain.size:
        return plain
    try:
        within = SharedMemory(plain, parts, timeout=timeout)
    except BackendError as error:  # raised on all ranks or none
        if plain.rank == 0:  # not by `warnings`, which `python -W error` turns into an exception, on this rank alone
            log.warning("%s; all_reduce of CPU tensors goes through sockets, slower", error)
        return plain
    if len(parts) == 1:
        return within
    first = [part[0] for part in parts]
    return TwoLevel(plain, within, between(first) if plain.rank in first else None)
