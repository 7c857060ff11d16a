"""The one verb of this package: sum a vector over the replicas."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from syncbn.errors import DTypeError, GroupError


@runtime_checkable
class Communicator(Protocol):
    """Sums vectors over a fixed set of replicas. Any object with these three members will do.

    Attributes:
        rank: this replica's number, 0 <= rank < size.
        size: the number of replicas.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all replicas, the same bits on each of them.

        Args:
            x: contiguous float32 or float64 tensor without grad, of the same shape and dtype on every replica. Its
                memory may be reused for the result: do not use it afterwards.

        Raises:
            DTypeError: `x` is not what is asked for above; raised before anything is sent.
            CollectiveError: a peer is lost or does not call within the communicator's deadline.
        """
        ...


@runtime_checkable
class Splittable(Communicator, Protocol):
    """A communicator that can be divided, which the groups `"node"` and `int` need."""

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank. Every rank calls it, with the same partition.

        Args:
            partition: disjoint lists of ranks that together hold every rank once.
        """
        ...


@dataclass(frozen=True)
class LostGroup:
    """What a pickled process group becomes: a handle means nothing in another process."""

    description: str


class SharedHandle:
    """Base of objects that hold a native handle: deep copies share it, pickles drop it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHandle:
        return self

    def __reduce__(self) -> tuple[type[LostGroup], tuple[str]]:
        return LostGroup, (type(self).__name__,)


def check_payload(x: Tensor) -> None:
    """Refuse, before anything is sent, what the `Communicator` contract does not allow."""
    if x.dtype not in (torch.float32, torch.float64):
        raise DTypeError(f"all_reduce expected float32 or float64, got {x.dtype}: convert the tensor first")
    if x.requires_grad:
        raise DTypeError("all_reduce expected a tensor without grad: pass x.detach()")
    if not x.is_contiguous():
        raise DTypeError(f"all_reduce expected a contiguous tensor, got strides {x.stride()}: pass x.contiguous()")


_SPINS = 200  # looks before the core is offered to another rank each time


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Poll until `done()`, for backends without a bounded wait of their own; False after `seconds`."""
    deadline = time.monotonic() + seconds
    spins = 0
    while not done():
        spins += 1
        if spins > _SPINS:
            os.sched_yield()  # ranks may outnumber cores
        if time.monotonic() > deadline:
            return False
    return True


def part_of(rank: int, partition: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the part of `partition` that holds `rank`; GroupError if none does."""
    for part in partition:
        if rank in part:
            return part
    raise GroupError(f"rank {rank} is in no part of {partition}")
