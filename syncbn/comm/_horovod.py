"""Horovod as a communicator. The only file that imports horovod, and only when asked to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor

from syncbn.errors import BackendError, CollectiveError, GroupError

from ._protocol import Communicator, SharedHandle, check_payload, part_of, wait_until


def _hvd() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise BackendError(
            f"Horovod needs a build against the installed torch: bash launch/install_horovod.sh ({error})"
        ) from error
    return hvd


class Horovod(SharedHandle):
    """A Horovod process set.

    Horovod matches tensors by name, keeps what it negotiated under that name, and names the tensor when ranks stall.
    So every collective has a stable name: `<name>.<number of elements>`. The layer makes `name` its own, and the
    two directions differ in length (2C+1 forward, 2C backward).

    Args:
        process_set: a registered `horovod.torch.ProcessSet`; None is the global one.
        name: prefix of the names, the same on every rank.
        timeout: Horovod's own (`init` sets them) come first and say more. A rank waits twice as long: Horovod 0.28.1
            may drop a tensor that is enqueued while its background thread ends, and would then wait for ever.

    Raises:
        BackendError: horovod is not installed for this torch.
        GroupError: Horovod is not initialised, or this rank is not in the process set.
    """

    def __init__(
        self, process_set: Any = None, *, name: str = "syncbn", timeout: timedelta = timedelta(minutes=10)
    ) -> None:
        hvd = _hvd()
        if not hvd.is_initialized():
            raise GroupError("Horovod is not initialised: call syncbn.init() or horovod.torch.init()")
        self.process_set = hvd.global_process_set if process_set is None else process_set
        if self.process_set.process_set_id is None:
            raise GroupError(f"{self.process_set} is not registered: call horovod.torch.add_process_set on every rank")
        if not self.process_set.included():
            raise GroupError(f"rank {hvd.rank()} is not in {self.process_set}: give it a process set that holds it")
        self.rank: int = self.process_set.rank()
        self.size: int = self.process_set.size()
        self.name = name
        self._timeout = timeout

    @classmethod
    def init(cls, timeout: timedelta) -> Horovod:
        """Initialise Horovod, which shuts itself down at exit, and return the global process set's communicator."""
        hvd = _hvd()
        seconds = max(2, int(timeout.total_seconds()))
        # Read by Horovod's core. Groups are process sets; without a limit a rank waits for a lost peer for ever.
        os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(min(60, seconds // 2)))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(seconds))
        # A cut link. horovodrun always sets it, to 30 s: short, on a busy machine, for ranks to meet in hvd.init().
        os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(seconds)
        hvd.init()
        return cls(timeout=timeout)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the process set."""
        check_payload(x)
        if self.size == 1:
            return x
        hvd = _hvd()
        name = f"{self.name}.{x.numel()}"
        try:
            # Horovod averages unless told otherwise.
            handle = hvd.allreduce_async(x, op=hvd.Sum, name=name, process_set=self.process_set)
            if not wait_until(lambda: hvd.poll(handle), 2 * self._timeout.total_seconds()):
                raise RuntimeError(f"no answer from Horovod within {2 * self._timeout.total_seconds():g} s")
            total: Tensor = hvd.synchronize(handle)
        except RuntimeError as error:  # HorovodInternalError is one
            raise CollectiveError(
                f"all_reduce {name!r} failed on rank {self.rank} of {self.size} (Horovod): a peer died, ended, or did "
                f"not call: {error}"
            ) from error
        return total

    def named(self, name: str) -> Horovod:
        """Return a communicator of the same process set whose collectives are called `name`."""
        return Horovod(self.process_set, name=name, timeout=self._timeout)

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank; every rank registers every process set."""
        hvd = _hvd()
        to_world = self.process_set.ranks if self.process_set.ranks is not None else list(range(hvd.size()))
        sets = [_registered([to_world[r] for r in part]) for part in partition]
        mine = list(partition).index(part_of(self.rank, partition))
        return Horovod(sets[mine], name=self.name, timeout=self._timeout)


_process_sets: dict[tuple[int, ...], Any] = {}  # Horovod refuses to register the same ranks twice


def _registered(ranks: list[int]) -> Any:
    """Return the process set of `ranks`, registered at the first call."""
    hvd = _hvd()
    if ranks == list(range(hvd.size())):
        return hvd.global_process_set
    known = _process_sets.get(tuple(ranks))
    if known is not None and known.process_set_id is not None:  # None: removed, or Horovod was shut down
        return known
    try:
        _process_sets[tuple(ranks)] = hvd.add_process_set(ranks)
    except ValueError as error:
        raise GroupError(
            f"Horovod could not register a process set for ranks {ranks}; if you registered it yourself, pass it as "
            f"process_group; if you called horovod.torch.init() yourself, set HOROVOD_DYNAMIC_PROCESS_SETS=1: {error}"
        ) from error
    return _process_sets[tuple(ranks)]
