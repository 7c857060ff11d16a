"""torch.distributed as a communicator: any backend, any group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import GroupError

from ._carried import Carrying
from ._hosts import by_hosts
from ._pairs import Pairs
from ._protocol import BaseCommunicator, Communicator, check_timeout, log, part_of

_c10d: Any = getattr(dist, "distributed_c10d", None)  # None: a torch without torch.distributed
_TAG = 0x5BA7  # of messages between two ranks: not one that the user's own have


class TorchDistributed(Carrying):
    """A `torch.distributed` process group.

    Where the group's backend is Gloo, tensors are added in memory that the ranks of a host share (`SharedMemory`), and
    between one rank of each host by messages of our own through Gloo. Neither can meet the group's collectives, such as
    DDP's, in another order on another rank. That is set up in the first `all_reduce`; `SYNCBN_SHARED_MEMORY=0` in the
    environment leaves the messages alone.

    Other backends (NCCL) add in the group itself, so in one order with whatever else uses it. `syncbn.init` and
    `syncbn.world` therefore make a group of their own for them, `own_group=True`, and so does `process_group=None` of a
    layer. To save that, give layers `process_group=syncbn.comm.TorchDistributed()`. It has not been run on a GPU.

    The group's own timeout bounds every wait: set one in `syncbn.init` or `init_process_group`. The group is held
    weakly: it is gone, and this closed, once torch has destroyed it.

    Args:
        group: the process group; None is the default group.
        timeout: of the groups that are made here, and of shared memory; None is torch's default, and the group's.
        own_group: of the default group, with a backend other than Gloo: make another by `new_group` (collective over
            the world) in the first `all_reduce`. It costs that set-up, and NCCL's buffers on the device once more.

    Raises:
        GroupError: torch.distributed is not initialised, the group was destroyed, or this rank is not in it.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout: timedelta | None = None, own_group: bool = False
    ) -> None:
        if timeout is not None:
            check_timeout(timeout)
        if not (dist.is_available() and dist.is_initialized()):
            raise GroupError(
                "torch.distributed is not initialised: call syncbn.init() or torch.distributed.init_process_group()"
            )
        chosen: Any = dist.group.WORLD if group is None else group
        if chosen is not dist.GroupMember.NON_GROUP_MEMBER and not is_alive(chosen):
            raise GroupError(f"{DESTROYED}: give a group that exists, or None for the world")
        rank = dist.get_rank(chosen)
        if rank < 0:
            raise GroupError(
                f"rank {dist.get_rank()} of the world is not in the process group: give this rank a group that holds "
                "it, as torch.distributed.new_group returns on the group's members only"
            )
        super().__init__(rank, dist.get_world_size(chosen))
        self._group = weakref.ref(chosen, _closes(self))
        self._timeout = timeout
        self._backends = _backends(chosen)
        self._own = own_group
        self._native: weakref.ref[Any] | None = None if own_group else self._group
        self._over_gloo: BaseCommunicator | None = None  # how it is done there, known after the first
        self.owns_group = False  # and so destroys it in `close`
        self.backends = frozenset(self._backends.values())
        self.transport = "+".join(sorted(self.backends))

    @property
    def group(self) -> Any:
        """The process group. Raises GroupError once it is destroyed."""
        return _held(self._group)

    def takes(self, device: torch.device) -> bool:
        """Tell whether the backend has collectives for tensors on `device`."""
        return device.type in self._backends

    def exists(self) -> bool:
        """Tell whether torch still knows the group, whoever holds the object."""
        return is_alive(self._group())

    def _check(self, x: Tensor) -> None:
        if not is_alive(self._group()):
            self.end(DESTROYED)
        elif not (x.is_cpu and self._over_gloo is not None) and x.device.type not in self._backends:
            raise GroupError(
                f"the process group's backend ({self.transport}) has no collectives for {x.device.type} tensors, only "
                f"for {sorted(self._backends)}: initialise with 'cpu:gloo,cuda:nccl', or move the model"
            )

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        if x.is_cpu and self._over_gloo is not None:  # the one that is to be quick
            return self._over_gloo._sum(x, signature)
        if self._backends[x.device.type] == "gloo":
            total, verdict = (self._over_gloo or self._set_up())._sum(x.cpu(), signature)
            return total.to(x.device), verdict
        return super()._sum(x, signature)

    def _add(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._native_group(x.device.type))
        return x

    def _set_up(self) -> BaseCommunicator:
        timeout = self._timeout or _timeout_of(self.group) or timedelta(minutes=10)
        plain = GlooPairs(self._group, list(range(self.size)), timeout)
        self._over_gloo = by_hosts(plain, lambda ranks: GlooPairs(self._group, ranks, timeout), timeout)
        self.transport = "+".join([self._over_gloo.transport, *sorted(self.backends - {"gloo"})])
        log.debug("%r", self)
        return self._over_gloo

    def _native_group(self, device: str) -> Any:
        if self._native is None:
            made: Any = dist.new_group(backend=self._backends[device], timeout=self._timeout)
            self._native = weakref.ref(made)  # torch holds it
            log.debug("%r, in a process group of its own", self)
        return _held(self._native)

    def _give_up(self) -> None:
        if self._over_gloo is not None:
            self._over_gloo._give_up()

    def _release(self) -> None:
        if self._over_gloo is not None:
            self._over_gloo.close()
            self._over_gloo = None
        own = [self._native] if self._own else []
        for group in (*own, *([self._group] if self.owns_group else [])):
            if group is not None and is_alive(group()):
                dist.destroy_process_group(group())

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank; every rank makes every group, in one order."""
        to_world = dist.get_process_group_ranks(self.group)
        groups = [dist.new_group([to_world[r] for r in part], timeout=self._timeout) for part in partition]
        mine = list(partition).index(part_of(self.rank, partition))
        part = TorchDistributed(groups[mine], timeout=self._timeout)
        part.owns_group = True
        return part


DESTROYED = "its torch.distributed process group was destroyed"


def is_alive(group: Any) -> bool:
    """Tell whether torch still knows `group`. There is no public way."""
    return group is not None and group in _c10d._world.pg_map


def _held(group: weakref.ref[Any]) -> Any:
    held = group()
    if not is_alive(held):
        raise GroupError(DESTROYED)
    return held


def _closes(comm: TorchDistributed) -> Callable[[Any], None]:
    """Return what closes `comm` when its group is gone, and does not keep it."""
    of = weakref.ref(comm)

    def close(_: Any) -> None:
        held = of()
        if held is not None:
            held.end(DESTROYED)

    return close


def _backends(group: Any) -> dict[str, str]:
    """Return the backend for each type of device, {"cpu": "gloo", "cuda": "nccl"}."""
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    configured: dict[str, str] = dict(pairs)
    return {device.type: configured.get(device.type, "") for device in group._device_types}


def _timeout_of(group: Any) -> timedelta | None:
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)  # there is no public way
    return getattr(options, "_timeout", None)


class GlooPairs(Pairs):
    """Some ranks of a Gloo group, by messages of our own.

    No group of their own: only they could make it, and `new_group` for its members only (use_local_synchronization,
    torch 2.13) hangs where they have been in different numbers of groups before.
    """

    transport = "gloo"

    def __init__(self, group: weakref.ref[Any], ranks: Sequence[int], timeout: timedelta) -> None:
        super().__init__(list(ranks).index(dist.get_rank(group())), len(ranks))
        self._group = group
        self._ranks = ranks
        self._timeout = timeout

    def _swap(self, peer: int, outgoing: Tensor | None, incoming: Tensor | None) -> None:
        group, rank = _held(self._group), self._ranks[peer]
        try:
            sending = None if outgoing is None else group.send([outgoing], rank, _TAG)
            receiving = None if incoming is None else group.recv([incoming], rank, _TAG)
            for work in filter(None, (receiving, sending)):
                work.wait(self._timeout)
        except RuntimeError as error:
            raise RuntimeError(f"rank {rank}: {error}") from error
