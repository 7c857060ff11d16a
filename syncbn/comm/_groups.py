"""From what the user calls a group to a communicator: None, "world", "node", int, a native handle, a Communicator."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist

from syncbn.errors import GroupError

from ._distributed import TorchDistributed
from ._horovod import Horovod
from ._hosts import hosts
from ._mpi import attached
from ._protocol import Communicator, LostGroup, SharedHandle, Splittable
from ._single import SingleProcess

ProcessGroup = Any
"""None | "world" | "node" | int | torch ProcessGroup | mpi4py Comm | horovod ProcessSet | Communicator."""

_EXPECTED = (
    "expected None, 'world', 'node', a number of replicas per group, a torch ProcessGroup, an mpi4py Comm, "
    "a horovod ProcessSet or a syncbn Communicator"
)

_single = SingleProcess()
_world: Communicator | None = None  # what syncbn.init made
_default_group: TorchDistributed | None = None  # of a process group that the user initialised
_parts: dict[tuple[Communicator, str | int], Communicator] = {}  # by world and "node" or int
_names = itertools.count()


def world() -> Communicator:
    """Return the communicator of all replicas: what `syncbn.init` made, else torch.distributed's, else a single one.

    Example:
        >>> world().size
        1
    """
    global _default_group
    if _world is not None:
        return _world
    if not (dist.is_available() and dist.is_initialized()):
        return _single
    if _default_group is None or _default_group.group is not dist.group.WORLD:  # destroyed and made again
        _default_group = TorchDistributed()
    return _default_group


def set_world(comm: Communicator | None) -> None:
    """Make `comm` what `world` returns; None undoes it."""
    global _world
    _world = comm
    _parts.clear()


def check_spec(spec: ProcessGroup) -> None:
    """Refuse what can never name a group, without communicating. Raises GroupError."""
    if isinstance(spec, (bool, type)) or not _is_known(spec):
        raise GroupError(f"unknown process group {spec!r} of type {type(spec).__name__}: {_EXPECTED}")
    if isinstance(spec, str) and spec not in ("world", "node"):
        raise GroupError(f"unknown process group {spec!r}: {_EXPECTED}")
    if isinstance(spec, int) and spec < 1 and spec != dist.GroupMember.NON_GROUP_MEMBER:
        raise GroupError(f"expected at least 1 replica per group, got {spec}")


def _is_known(spec: ProcessGroup) -> bool:
    return (
        spec is None
        or _package(spec) in ("mpi4py", "horovod")  # before Communicator: asking COMM_NULL for its rank is an error
        or isinstance(spec, (str, int, LostGroup, dist.ProcessGroup, Communicator))
    )


def _package(spec: ProcessGroup) -> str:
    return type(spec).__module__.partition(".")[0]


def resolve(spec: ProcessGroup) -> Communicator:
    """Return the communicator of the group `spec`.

    `"node"` and int are parts of `world()`: the ranks of one host, or consecutive ranks, `spec` at a time, the last
    part taking what is left (9 ranks in groups of 4: 4, 4, 1). The first call with one of them in a world is collective
    over the whole world: every rank makes all parts in one order. The result is kept.

    Raises:
        GroupError: `spec` is unknown, was lost by pickling, or does not hold this rank.
        BackendError: the package behind the handle is missing.
    """
    if isinstance(spec, SharedHandle):  # one of our own communicators; a plain check, which torch.compile can trace
        return spec  # type: ignore[return-value]
    check_spec(spec)
    if spec is None or spec == "world":
        return world()
    if isinstance(spec, LostGroup):
        raise GroupError(
            f"the layer's process group (a {spec.description}) was not saved with it, since a handle means nothing in "
            "another process: set layer.process_group, to None for the world"
        )
    if spec is dist.GroupMember.NON_GROUP_MEMBER:
        raise GroupError("this rank is not in the process group (GroupMember.NON_GROUP_MEMBER): give it one of its own")
    if isinstance(spec, (str, int)):
        return _part(spec)
    if isinstance(spec, dist.ProcessGroup):
        return TorchDistributed(spec)
    if _package(spec) == "mpi4py":
        return attached(spec)
    if _package(spec) == "horovod":
        return Horovod(spec)
    return spec  # type: ignore[no-any-return]


def _part(spec: str | int) -> Communicator:
    whole = world()
    key = (whole, spec)
    if key not in _parts:
        if not isinstance(whole, Splittable):
            raise GroupError(
                f"{type(whole).__name__} cannot be divided into groups: give it a split method, or pass a "
                "communicator of the group itself"
            )
        _parts[key] = whole.split(_nodes(whole) if spec == "node" else consecutive(whole.size, int(spec)))
    return _parts[key]


def _nodes(comm: Communicator) -> list[list[int]]:
    only_cuda = isinstance(comm, TorchDistributed) and not comm.takes(torch.device("cpu"))
    return hosts(comm, device="cuda" if only_cuda else "cpu")


def consecutive(size: int, per_group: int) -> list[list[int]]:
    """Divide `size` ranks into runs of `per_group`.

    Example:
        >>> consecutive(9, 4)
        [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    """
    ranks = list(range(size))
    return [ranks[start : start + per_group] for start in range(0, size, per_group)]


class Group:
    """A layer's process group: the specification, and the communicator that it turns out to be when first needed.

    Deep copies share it. A pickle keeps what means the same elsewhere (None, "world", "node", int) and otherwise a
    `LostGroup`, which is an error when it is used, never silently another group.
    """

    def __init__(self, spec: ProcessGroup = None) -> None:
        check_spec(spec)
        self.spec = spec
        self._name = ""
        self._resolved: tuple[Communicator, Communicator] | None = None  # (the world then, the group's communicator)

    def communicator(self) -> Communicator:
        """Return the communicator, made at the first call; again when the world was made anew."""
        whole = world()
        if self._resolved is None or self._resolved[0] is not whole:
            self._resolved = whole, self._named(resolve(self.spec))
        return self._resolved[1]

    def _named(self, comm: Communicator) -> Communicator:
        """Give Horovod a name that is the layer's own: layers are first run in the same order on every rank."""
        if not isinstance(comm, Horovod):
            return comm
        self._name = self._name or f"syncbn.layer{next(_names)}"
        return comm.named(self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[type[Group], tuple[ProcessGroup]]:
        spec = self.spec
        if isinstance(spec, dist.ProcessGroup) and dist.is_initialized() and spec is dist.group.WORLD:
            spec = "world"
        portable = spec is None or isinstance(spec, (str, int, LostGroup, SingleProcess))
        return Group, (spec if portable else LostGroup(type(spec).__name__),)
