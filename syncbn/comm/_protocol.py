"""The one verb of this package: sum a vector over the replicas."""

from __future__ import annotations

import itertools
import logging
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from syncbn.errors import (
    CollectiveError,
    DTypeError,
    GroupError,
    InputError,
    MismatchError,
    PeerLostError,
    SyncBatchNormError,
)

from . import _verdict
from ._place import ALL_REDUCE, Call, Place


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


class BaseCommunicator(ABC):
    """What our communicators have in common: the checks, the states, the errors. A backend supplies `_sum`.

    A communicator is *open*. It is *broken* for good by whatever leaves its ranks out of step: a failure or an
    interruption of `all_reduce`, a mismatch, or a fork (in the child). It is *closed* by `close`, or with the group
    beneath it.

    Attributes:
        state: "open", "broken" or "closed".
        key: names it in this process, see `_groups`.
        transport: what carries the vectors.
        backends: what `init` calls it.
        call: the sum that this rank waits for; None between two.
        last: the sum before.
        vector: what this rank adds to the sum that it waits for.
        members: the ranks, as the world numbers them, where the watchdog may end a wait: `verdict` then says why.
        before: called with each vector and its place before they are summed, see `tell`.
    """

    transport = ""
    backends: frozenset[str] = frozenset()
    before: Callable[[Tensor, Place], None] | None = None

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.state = "open"
        self.key = f"{type(self).__name__} {next(_numbers)}"
        self.call: Call | None = None
        self.last: Call | None = None
        self.vector: Tensor | None = None
        self.members: Sequence[int] | None = None
        self.verdict: Exception | None = None
        self._reason = ""  # why it is not open
        self._mismatches = 0
        self._calls: dict[int, int] = {}  # how often each place has called, by its digest
        by_key[self.key] = self

    def all_reduce(self, x: Tensor, place: Place = ALL_REDUCE) -> Tensor:
        """Return the sum of `x` over the ranks, see `Communicator.all_reduce`.

        Args:
            x: the vector.
            place: who asks. The ranks compare it, and how often it has asked: see `MismatchError`.
        """
        check_payload(x)
        self._check(x)
        if self.state != "open":
            raise self._not_open(place)
        if self.before is not None:
            self.before(x, place)
        if self.size == 1:
            return x
        number = self._calls[place.digest] = self.calls(place) + 1
        self.vector = x
        self.call = call = Call(place, number)
        try:
            total, verdict = self._sum(x, call.signature)
            if verdict:
                self._disagree(verdict, call, x)
        except SyncBatchNormError as error:  # from within the first all_reduce, which sets the transport up
            self.fail(str(error), peers_know=isinstance(error, MismatchError))
            raise
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.fail(f"in {call}: out of memory {self._here()}")
                raise
            self.fail(f"in {call}: all_reduce of {x.numel()} numbers failed {self._here()}: {LOST}: {error}")
            self._reason += "".join(ask(self) for ask in witnesses)
            raise PeerLostError(self._reason) from error
        except BaseException as error:  # KeyboardInterrupt, for one
            self.fail(f"in {call}: all_reduce of {x.numel()} numbers was interrupted {self._here()}: {error!r}")
            raise
        self.call, self.last, self.vector = None, call, None
        return total

    def calls(self, place: Place) -> int:
        """Return how often `place` has asked for a sum."""
        return self._calls.get(place.digest, 0)

    def tell(self, before: Callable[[Tensor, Place], None] | None) -> None:
        """Have `before(x, place)` called before each sum; None: no more."""
        self.before = before

    @abstractmethod
    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        """Return the sum over at least two ranks, and whether they agree: AGREE, OTHER_PLACE or OTHER_VECTOR.

        `signature` is 63 bits that are compared. The verdict is the same on all ranks, and they are in step after it;
        where it is OTHER_VECTOR the sum is nothing. RuntimeErrors become PeerLostErrors in `all_reduce`.
        """

    def _disagree(self, verdict: int, call: Call, x: Tensor) -> None:
        """Say so on every rank: MismatchError, or, where that is wanted and there is a sum, a warning."""
        tolerated = verdict == _verdict.OTHER_PLACE and _verdict.setting() is False
        self._mismatches += 1
        if tolerated and self._mismatches & self._mismatches - 1:  # says so the 1st, 2nd, 4th, ... time
            return

        def add(rows: Tensor) -> Tensor:
            return self._sum(rows.to(x.device), 0)[0]

        error = _verdict.gather(call, x, self.rank, self.size, add)
        if not tolerated:
            raise error
        log.warning("%s", error)

    def _check(self, x: Tensor) -> None:  # noqa: B027
        """Refuse a tensor that this backend cannot sum, before anything is sent; close where the group is gone."""

    def fail(self, reason: str, *, peers_know: bool = False) -> None:
        """Break: the ranks are out of step. Peers that wait for this one are told, where that is possible."""
        self.state, self._reason = "broken", reason
        if not peers_know:  # those that do may still be reading
            self._give_up()

    def _give_up(self) -> None:  # noqa: B027
        """Let peers that wait for this rank know that it will not come."""

    def close(self) -> None:
        """Release what this communicator made for itself. Every rank of it calls this; what the user made stays."""
        self.end("close() was called")

    def end(self, reason: str) -> None:
        """Close, for `reason`; does nothing where that has happened."""
        if self.state == "closed":
            return
        for tell in on_end or ():  # None: the interpreter ends
            tell(self)
        if self._reason != FORKED:  # what the parent holds is not the child's to release
            self._release()
        self.state, self._reason = "closed", reason

    def _release(self) -> None:  # noqa: B027
        """Release what this communicator owns; called once. `state` still tells whether it is broken."""

    def exists(self) -> bool:
        """Tell whether the native group beneath exists; cheap, local."""
        return True

    def _not_open(self, place: Place) -> SyncBatchNormError:
        if self.state == "closed":
            return GroupError(f"in {place.text}: {self!r}: {self._reason}; use syncbn.world(), or a group that exists")
        return CollectiveError(
            f"in {place.text}: {self!r}, since its ranks are out of step: {self._reason}. Start the job again, or on "
            "every rank close() this communicator and make another (of the world: syncbn.init())"
        )

    def _here(self) -> str:
        return f"on rank {self.rank} of {self.size} ({self.transport})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.size}, {self.transport}, {self.state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseCommunicator:
        return self  # a handle cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return LostGroup, (type(self).__name__,)


LOST = "a peer died, ended, or did not call in time"
FORKED = "this process was forked from the one that made the communicator, and a child cannot act for its parent"
log = logging.getLogger("syncbn")
by_key: weakref.WeakValueDictionary[str, BaseCommunicator] = weakref.WeakValueDictionary()
witnesses: list[Callable[[BaseCommunicator], str]] = []  # asked where its peer is lost, for what they know
on_end: list[Callable[[BaseCommunicator], None]] = []  # called with a communicator that is about to close
_numbers = itertools.count()


def _after_fork() -> None:
    for comm in list(by_key.values()):
        if comm.size > 1 and comm.state != "closed":
            comm.state, comm._reason = "broken", FORKED


os.register_at_fork(after_in_child=_after_fork)


def check_payload(x: Tensor) -> None:
    """Refuse, before anything is sent, what the `Communicator` contract does not allow."""
    if type(x) is not Tensor:  # the memory of a wrapper (DTensor, FakeTensor) is not where data_ptr() says
        raise DTypeError(
            f"all_reduce expected a plain torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}: pass the "
            "tensor that it holds (of a DTensor: x.to_local(); of a parameter: x.detach())"
        )
    if x.dtype is not torch.float64 and x.dtype is not torch.float32:
        raise DTypeError(f"all_reduce expected float32 or float64, got {x.dtype}: convert the tensor first")
    if x.requires_grad:
        raise DTypeError("all_reduce expected a tensor without grad: pass x.detach()")
    if x.layout is not torch.strided:
        raise DTypeError(f"all_reduce expected a dense tensor, got {x.layout}: pass x.to_dense()")
    if not x.is_contiguous():
        raise DTypeError(f"all_reduce expected a contiguous tensor, got strides {x.stride()}: pass x.contiguous()")
    if x.is_neg():  # its memory holds -x
        raise DTypeError("all_reduce expected plain memory, got a negative view: pass x.resolve_neg()")
    if _is_transformed(x):
        raise DTypeError("all_reduce cannot be transformed by torch.func (grad, vmap, jvp): call it outside")


def kind_of(x: Tensor) -> int:
    """Return a number that is the same for vectors of one length and dtype."""
    return 2 * x.numel() + (x.dtype == torch.float64)


_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
_SPINS = 200  # looks before the core is offered to another rank each time


def wait_until(done: Callable[[], bool], seconds: float, comm: BaseCommunicator) -> bool:
    """Poll until `done()`, for backends without a bounded wait of their own; False after `seconds`.

    Raises:
        Exception: the verdict of the watchdog on `comm`.
    """
    deadline = time.monotonic() + seconds
    spins = 0
    while not done():
        spins += 1
        if spins > _SPINS:
            os.sched_yield()  # ranks may outnumber cores
            if comm.verdict is not None:
                raise comm.verdict
        if time.monotonic() > deadline:
            return False
    return True


def check_timeout(timeout: timedelta) -> None:
    """Refuse what is no time to wait; InputError, before any communication."""
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        raise InputError(f"timeout={timeout!r}: expected a positive datetime.timedelta, such as timedelta(seconds=60)")


def part_of(rank: int, partition: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the part of `partition` that holds `rank`; GroupError if none does."""
    for part in partition:
        if rank in part:
            return part
    raise GroupError(f"rank {rank} is in no part of {partition}")
