"""torch.distributed as a communicator: any backend, any group."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import CollectiveError, GroupError

from ._hosts import by_hosts
from ._protocol import Communicator, SharedHandle, check_payload, part_of

# Gloo's cost is round trips: 2(w-1) for its all-reduce, w-1 for an all-gather. Beyond a few ranks the bytes of the
# all-gather, which grow with w, eat the gain.
_GATHER_AT_MOST = 8
_TAG = 0x5BA7  # of messages between two ranks: not one that the user's own have


_made: weakref.WeakSet[TorchDistributed] = weakref.WeakSet()


class TorchDistributed(SharedHandle):
    """A `torch.distributed` process group.

    Over Gloo, CPU tensors are added in memory that the ranks of a host share (`SharedMemory`), and between one rank of
    each host by Gloo. That is set up in the group's first `all_reduce` of a CPU tensor. `SYNCBN_SHARED_MEMORY=0` in the
    environment turns it off. Other backends have shared memory of their own.

    The group's own timeout bounds every wait: set one in `syncbn.init` or `init_process_group`.

    Args:
        group: the process group; None is the default group.
        timeout: of the groups that `split` makes, and of shared memory; None is torch's default, and the group's.

    Raises:
        GroupError: torch.distributed is not initialised, or this rank is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: timedelta | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise GroupError(
                "torch.distributed is not initialised: call syncbn.init() or torch.distributed.init_process_group()"
            )
        chosen: Any = dist.group.WORLD if group is None else group
        self.group = chosen
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise GroupError(
                f"rank {dist.get_rank()} of the world is not in the process group: give this rank a group that holds "
                "it, as torch.distributed.new_group returns on the group's members only"
            )
        self.size = dist.get_world_size(self.group)
        self._timeout = timeout
        self._devices = {device.type for device in chosen._device_types}
        self._plain = _Plain(chosen)
        self._cpu: Communicator | None = None  # how CPU tensors are added, known after the first
        _made.add(self)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the group."""
        if self._cpu is not None and x.is_cpu and not torch.compiler.is_compiling():
            return self._cpu.all_reduce(x)  # which checks x
        if self.size == 1:
            return x
        check_payload(x)
        if not self.takes(x.device):
            raise GroupError(
                f"the process group's backend ({dist.get_backend(self.group)}) has no collectives for {x.device.type} "
                f"tensors, only for {sorted(self._devices)}: initialise with 'cpu:gloo,cuda:nccl', or move the model"
            )
        if torch.compiler.is_compiling():  # torch.compile traces the plain collective, not what is around it here
            dist.all_reduce(x, group=self.group)
            return x
        return (self._over_cpu() if x.device.type == "cpu" else self._plain).all_reduce(x)

    def takes(self, device: torch.device) -> bool:
        """Tell whether the backend has collectives for tensors on `device`."""
        return device.type in self._devices

    def _over_cpu(self) -> Communicator:
        if self._cpu is None:
            self._cpu = self._by_hosts() if self._plain.is_gloo("cpu") else self._plain
        return self._cpu

    def _by_hosts(self) -> Communicator:
        options = getattr(self.group._get_backend(torch.device("cpu")), "options", None)  # there is no public way
        timeout = self._timeout or getattr(options, "_timeout", None) or timedelta(minutes=10)
        return by_hosts(self._plain, lambda ranks: _Pairs(self._plain, ranks, timeout), timeout)

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank; every rank makes every group, in one order."""
        to_world = dist.get_process_group_ranks(self.group)
        groups = [dist.new_group([to_world[r] for r in part], timeout=self._timeout) for part in partition]
        mine = list(partition).index(part_of(self.rank, partition))
        return TorchDistributed(groups[mine], timeout=self._timeout)


def release() -> None:
    """Let go of all process groups, at the end of the process: Gloo joins its threads when the last reference goes.

    A thread of its that waits for the interpreter, to free the tensors of the last collective, while that ends already
    would abort the process. The pause serves those whose group the user still holds (DDP does).
    """
    for comm in list(_made):
        comm.group = comm._plain.group = comm._cpu = None
    dist.destroy_process_group()
    time.sleep(0.02)


class _Plain(SharedHandle):
    """The group's own collectives, for CPU tensors and others."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        check_payload(x)
        gathers = self.size <= _GATHER_AT_MOST and self.is_gloo(x.device.type)
        try:
            return self._gather_and_add(x) if gathers else self._reduce(x)
        except RuntimeError as error:
            raise CollectiveError(
                f"all_reduce of {x.numel()} numbers failed on rank {self.rank} of {self.size} "
                f"({dist.get_backend(self.group)}): a peer died, ended, or did not call within the timeout: {error}"
            ) from error

    def is_gloo(self, device: str) -> bool:
        """Tell whether Gloo moves tensors on `device`: a group may have a backend for each."""
        return f"{device}:gloo" in dist.get_backend_config(self.group)

    def _reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def _gather_and_add(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        total = parts[0]
        for part in parts[1:]:  # in rank order: the same bits everywhere
            total += part
        return total


class _Pairs(SharedHandle):
    """Some ranks of a Gloo group, by recursive doubling: in step k, ranks that differ in bit k exchange their sums.

    log2(ranks) round trips, and no group of their own: only they could make it, and `new_group` for its members only
    (use_local_synchronization, torch 2.13) hangs where they have been in different numbers of groups before.
    """

    def __init__(self, whole: _Plain, ranks: Sequence[int], timeout: timedelta) -> None:
        self.rank = list(ranks).index(whole.rank)
        self.size = len(ranks)
        self._whole = whole
        self._ranks = ranks
        self._timeout = timeout

    def all_reduce(self, x: Tensor) -> Tensor:
        full = 1 << self.size.bit_length() - 1  # the largest power of two; the ranks beyond it go through a partner
        if self.rank >= full:
            self._exchange(x, self.rank - full, receive=False)
            return self._exchange(x, self.rank - full, send=False)
        if self.rank + full < self.size:
            x += self._exchange(x, self.rank + full, send=False)
        for bit in range(full.bit_length() - 1):
            peer = self.rank ^ 1 << bit
            other = self._exchange(x, peer)
            x = x + other if self.rank < peer else other + x  # in one order: the same bits, of a NaN too
        if self.rank + full < self.size:
            self._exchange(x, self.rank + full, receive=False)
        return x

    def _exchange(self, x: Tensor, peer: int, *, send: bool = True, receive: bool = True) -> Tensor:
        """Send `x` to `peer`, return what it sends, or one of the two."""
        group, rank, other = self._whole.group, self._ranks[peer], torch.empty_like(x)
        in_world = dist.get_global_rank(group, rank)
        try:
            sending = dist.isend(x, in_world, group, _TAG) if send else None
            receiving = dist.irecv(other, in_world, group, _TAG) if receive else None
            for work in filter(None, (receiving, sending)):
                work.wait(self._timeout)
        except RuntimeError as error:
            raise CollectiveError(
                f"all_reduce of {x.numel()} numbers failed on rank {self._whole.rank} of {self._whole.size} (gloo): "
                f"rank {rank} died, ended, or did not call within the timeout: {error}"
            ) from error
        return other
