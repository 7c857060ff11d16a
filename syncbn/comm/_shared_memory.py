"""Memory shared by the processes of one host as a communicator: microseconds, where sockets take hundreds."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from datetime import timedelta
from errno import EIO, ENOSYS
from typing import Any

import torch
from torch import Tensor

from syncbn._compiled import native
from syncbn.errors import BackendError, GroupError

from ._protocol import BaseCommunicator, Communicator, check_timeout, part_of
from ._verdict import AGREE

_Memory: Any = getattr(native, "SharedMemory", None)  # None also where the system is not Linux
AVAILABLE = _Memory is not None


class SharedMemory(BaseCommunicator):
    """Processes of one host, which add CPU tensors through memory that they share.

    The memory has no name: two jobs cannot meet, and it is gone with its processes, however they end. A rank waits
    awake for a moment, if there is a core for each, and then asleep. Longer vectors pass through in pieces.

    Making it is collective over `over`, which carries three small sums and is not used afterwards.

    Args:
        over: any communicator of the ranks.
        partition: disjoint lists of the ranks of `over`, each of one host; this communicator is of the one that holds
            this rank. None is all of them in one.
        timeout: how long a rank waits for its peers in one collective. A peer that ends is noticed within 0.1 s.

    Raises:
        BackendError: the memory cannot be had on one of the ranks; on every rank of `over`.

    Example:
        >>> from syncbn.comm import SingleProcess
        >>> SharedMemory(SingleProcess()).size
        1
    """

    transport = "shared memory"

    def __init__(
        self,
        over: Communicator,
        partition: Sequence[Sequence[int]] | None = None,
        *,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        check_timeout(timeout)
        part = list(range(over.size) if partition is None else part_of(over.rank, partition))
        super().__init__(part.index(over.rank), len(part))
        self.seconds = timeout.total_seconds()
        self._memory = _share(over, part)

    def _check(self, x: Tensor) -> None:
        if not x.is_cpu:
            raise GroupError(f"shared memory adds CPU tensors only, got one on {x.device}: use torch.distributed")

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        return self.sum(x, signature, self.seconds)

    def sum(self, x: Tensor, signature: int, seconds: float) -> tuple[Tensor, int]:
        """As `_sum`, with a deadline of its own."""
        if self._memory is None:  # alone
            return x, AGREE
        return x, self._memory.all_reduce(x.data_ptr(), x.numel(), x.dtype == torch.float64, seconds, signature)

    def _give_up(self) -> None:
        if self._memory is not None:
            self._memory.give_up()

    def _release(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._memory = None

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank."""
        return SharedMemory(self, partition, timeout=timedelta(seconds=self.seconds))


def _share(over: Communicator, part: list[int]) -> Any:
    """Make memory on the first rank of `part`, open it on the others, and agree over all of `over` that it went well.

    Every rank makes the same two calls of `over`, whatever happens to it in between.
    """
    first = over.rank == part[0]
    where = torch.zeros(over.size, 3, dtype=torch.float64, device="cpu")  # token, process and descriptor, by rank
    memory, error = None, 0
    if first:
        token = secrets.randbits(53)  # exact in float64
        memory, error = _open(part, 0, token, 0, -1)
        if memory is not None:
            where[over.rank] = torch.tensor([token, os.getpid(), memory.fd], dtype=torch.float64, device="cpu")
    where = over.all_reduce(where)
    if not first:
        memory, error = _open(part, part.index(over.rank), *where[part[0]].long().tolist())
    errors = torch.zeros(over.size, dtype=torch.float64, device="cpu")
    errors[over.rank] = error
    failed = {rank: int(code) for rank, code in enumerate(over.all_reduce(errors).tolist()) if code}
    if failed:
        reason = os.strerror(next(iter(failed.values())))  # of the lowest rank: the others' may follow from it
        raise BackendError(f"no shared memory on rank {', '.join(map(str, failed))} of {over.size}: {reason}")
    if memory is not None:
        memory.start()
    return memory


def _open(part: list[int], slot: int, token: int, process: int, descriptor: int) -> tuple[Any, int]:
    """Return the memory and 0, or None and the reason's errno."""
    if len(part) == 1:
        return None, 0
    if _Memory is None:
        return None, ENOSYS
    try:
        return _Memory(part, slot, token, process, descriptor), 0
    except OSError as error:
        return None, error.errno or EIO
