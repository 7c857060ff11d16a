"""torch.distributed as a communicator: any backend, any group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import CollectiveError, GroupError

from ._protocol import Communicator, SharedHandle, check_payload, part_of

# Gloo's cost is round trips: 2(w-1) for its all-reduce, w-1 for an all-gather. Beyond a few ranks the bytes of the
# all-gather, which grow with w, eat the gain.
_GATHER_AT_MOST = 8


class TorchDistributed(SharedHandle):
    """A `torch.distributed` process group.

    The group's own timeout bounds every wait: set one in `syncbn.init` or `init_process_group`.

    Args:
        group: the process group; None is the default group.
        timeout: of the groups that `split` makes; None is torch's default.

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
        self._gathers = dist.get_backend(self.group) == "gloo" and self.size <= _GATHER_AT_MOST

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the group."""
        if self.size == 1:
            return x
        check_payload(x)
        if not self.takes(x.device):
            raise GroupError(
                f"the process group's backend ({dist.get_backend(self.group)}) has no collectives for {x.device.type} "
                f"tensors, only for {sorted(self._devices)}: initialise with 'cpu:gloo,cuda:nccl', or move the model"
            )
        if torch.compiler.is_compiling():  # torch.compile traces the plain collective, not the exception handler
            dist.all_reduce(x, group=self.group)
            return x
        try:
            return self._gather_and_add(x) if self._gathers else self._reduce(x)
        except RuntimeError as error:
            raise CollectiveError(
                f"all_reduce of {x.numel()} numbers failed on rank {self.rank} of {self.size} "
                f"({dist.get_backend(self.group)}): a peer died, ended, or did not call within the timeout: {error}"
            ) from error

    def takes(self, device: torch.device) -> bool:
        """Tell whether the backend has collectives for tensors on `device`."""
        return device.type in self._devices

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

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank; every rank makes every group, in one order."""
        to_world = dist.get_process_group_ranks(self.group)
        groups = [dist.new_group([to_world[r] for r in part], timeout=self._timeout) for part in partition]
        mine = list(partition).index(part_of(self.rank, partition))
        return TorchDistributed(groups[mine], timeout=self._timeout)
