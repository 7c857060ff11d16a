"""The registry: from what the user calls a group to a key, and from a key to the one communicator of that group.

    spec   None | "world" | "node" | int | native handle | Communicator
    key    a string that names the group in this process: "world", "node", "4", "parts 0,2 1,3", "ProcessGroup 3"

A key costs nothing and says nothing of other ranks; the communicator is made when it is first asked for, once a group.
Handles are held weakly: a group that its owner destroys is gone, and what was made for it is released.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from syncbn._launch import detect
from syncbn.errors import GroupError, LaunchError

from . import _mpi
from ._distributed import TorchDistributed
from ._foreign import Foreign, Memory
from ._horovod import Horovod
from ._hosts import hosts
from ._protocol import BaseCommunicator, Communicator, LostGroup, Splittable, by_key, log
from ._single import SingleProcess

ProcessGroup = Any
"""None | "world" | "node" | int | torch ProcessGroup | 1-D DeviceMesh | mpi4py Comm | horovod ProcessSet |
Communicator."""

_EXPECTED = (
    "expected None, 'world', 'node', a number of replicas per group, a torch ProcessGroup or 1-D DeviceMesh, an mpi4py "
    "Comm, a horovod ProcessSet or a syncbn Communicator"
)


# ---- the world and its parts

alone = SingleProcess()
_world: BaseCommunicator = alone
_parts: dict[str, BaseCommunicator] = {}  # of this world, by key
_looked_for_launcher = False


def world() -> BaseCommunicator:
    """Return the communicator of all replicas: what `syncbn.init` made, else torch.distributed's, else a single one.

    It changes when that world ends (`close()`, `destroy_process_group`) or is made anew. What belonged to the old one
    is closed then; layers go on with the new one.

    Example:
        >>> world().size
        1
    """
    if _world.state == "closed" or not _world.exists() or (_world is alone and _torch_is_there()):
        return set_world(_successor(_world))
    return _world


def _successor(old: BaseCommunicator) -> BaseCommunicator:
    if isinstance(old, Horovod) and (restarted := old.successor()) is not None:
        return restarted
    return TorchDistributed(own_group=True) if _torch_is_there() else alone


def is_first() -> bool:
    """Tell whether this is rank 0, without making a communicator."""
    return (dist.get_rank() if _world is alone and _torch_is_there() else _world.rank) == 0


def _torch_is_there() -> bool:
    return dist.is_available() and dist.is_initialized()


def set_world(comm: BaseCommunicator) -> BaseCommunicator:
    """Make `comm` what `world` returns; close the world before it and all that hangs on it."""
    global _world
    for part in _parts.values():
        part.end("its world was closed, destroyed or replaced")
    _parts.clear()
    _world.end("its world was closed, destroyed or replaced")
    for native in list(_natives.values()):
        native.sweep()
    _world = comm
    log.debug("the world is %r", comm)
    return comm


def _world_or_warning() -> BaseCommunicator:
    """Return the world; log, once, if it is this process alone although a launcher started several."""
    global _looked_for_launcher
    comm = world()
    if comm is alone and not _looked_for_launcher:
        _looked_for_launcher = True
        with contextlib.suppress(LaunchError):  # contradictory variables: `init` says which
            launch = detect(os.environ)
            if launch.size > 1:
                # A log record: as an exception, under python -W error, one rank would raise it alone.
                log.warning(
                    "%s started %d processes (%s), and each works by itself, with statistics of its own: call "
                    "syncbn.init() before the first batch",
                    *(launch.launcher, launch.size, launch.variables[1]),
                )
    return comm


def _part(key: str) -> BaseCommunicator:
    whole = _world_or_warning()
    part = _parts.get(key)
    if part is None or part.state == "closed":
        if not isinstance(whole, Splittable):
            raise GroupError(
                f"{type(whole).__name__} cannot be divided into groups: give it a split method, or pass a "
                "communicator of the group itself"
            )
        made = whole.split(_partition(key, whole))
        part = _parts[key] = made if isinstance(made, BaseCommunicator) else Foreign(made, Memory())
    return part


def _partition(key: str, whole: Communicator) -> list[list[int]]:
    if key == "node":
        return _nodes(whole)
    if key.startswith(_PARTS):
        return [[int(rank) for rank in part.split(",")] for part in key.removeprefix(_PARTS).split()]
    return consecutive(whole.size, int(key))


def key_of_parts(partition: Sequence[Sequence[int]]) -> str:
    """Return the key of this rank's part of the world, in a partition of all its ranks.

    Example:
        >>> key_of_parts([[0, 2], [1, 3]]), key_of_parts([[0, 1, 2, 3]])
        ('parts 0,2 1,3', 'world')
    """
    if len(partition) == 1:
        return "world"
    return _PARTS + " ".join(",".join(map(str, part)) for part in partition)


_PARTS = "parts "


def _nodes(comm: Communicator) -> list[list[int]]:
    return hosts(comm, device=device_for(comm))


def device_for(comm: Communicator) -> str:
    """Return where vectors are that have no reason to be elsewhere: "cpu", where it can take those."""
    only_cuda = isinstance(comm, TorchDistributed) and not comm.takes(torch.device("cpu"))
    return "cuda" if only_cuda else "cpu"


def consecutive(size: int, per_group: int) -> list[list[int]]:
    """Divide `size` ranks into runs of `per_group`.

    Example:
        >>> consecutive(9, 4)
        [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    """
    ranks = list(range(size))
    return [ranks[start : start + per_group] for start in range(0, size, per_group)]


# ---- native handles and communicators of the user's own


class _Native:
    """What a user handed us: held weakly where Python can, with the communicator that was made for it."""

    def __init__(self, key: str, handle: Callable[[], Any]) -> None:
        self.key = key
        self.handle = handle
        self._comm: BaseCommunicator | None = None
        self._memory = Memory()  # of a communicator of the user's own
        _natives[key] = self

    def communicator(self) -> BaseCommunicator:
        comm = self._comm
        if comm is None or comm.state == "closed":
            handle = self.handle()
            if handle is None:
                raise _no_group(self.key)
            if _is_foreign(handle):  # would live by being remembered
                return Foreign(handle, self._memory)
            comm = self._comm = _communicator_of(handle)
        return comm

    def sweep(self) -> None:
        """Close where the group is gone, although somebody holds the handle."""
        if self._comm is not None and not self._comm.exists():
            self._comm.end("its group was destroyed")


_natives: dict[str, _Native] = {}  # by key
_keys: dict[int, str] = {}  # by id of the handle
_numbers = itertools.count()


def _forget(key: str, identity: int | None = None) -> None:
    """The handle is gone."""
    if identity is not None:
        _keys.pop(identity, None)
    native = _natives.pop(key, None)
    if native is not None and native._comm is not None:
        native._comm.end("its group was destroyed")


_mpi.on_free.append(_forget)


def _reference(handle: Any, gone: Callable[[Any], None] | None = None) -> Callable[[], Any]:
    try:
        return weakref.ref(handle, gone)
    except TypeError:  # has no room for weak references
        return lambda: handle


def _communicator_of(handle: Any) -> BaseCommunicator:
    if isinstance(handle, dist.ProcessGroup):
        return TorchDistributed(handle)
    return _mpi.MPI(handle) if _package(handle) == "mpi4py" else Horovod(handle)


def _is_foreign(handle: Any) -> bool:
    return not isinstance(handle, dist.ProcessGroup) and _package(handle) not in ("mpi4py", "horovod")


def _key_of_handle(handle: Any) -> str:
    identity = id(handle)
    key = _keys[identity] = f"{type(handle).__name__} {next(_numbers)}"
    _Native(key, _reference(handle, lambda _: _forget(key, identity)))
    return key


def _key_of_mpi(comm: Any) -> str:
    key = _mpi.label(comm, lambda: f"MPI.{type(comm).__name__} {next(_numbers)}")
    if key not in _natives:
        _Native(key, lambda: comm)  # the Python object is only a name for the handle
    return key


# ---- specifications


def check_spec(spec: ProcessGroup) -> None:
    """Refuse what can never name a group, without communicating. Raises GroupError."""
    if isinstance(spec, (bool, type)) or not _is_known(spec):
        raise GroupError(f"unknown process group {spec!r} of type {type(spec).__name__}: {_EXPECTED}")
    if isinstance(spec, str) and spec not in ("world", "node"):
        raise GroupError(f"unknown process group {spec!r}: {_EXPECTED}")
    if isinstance(spec, int) and spec < 1 and spec != dist.GroupMember.NON_GROUP_MEMBER:
        raise GroupError(f"expected at least 1 replica per group, got {spec}")
    if isinstance(spec, DeviceMesh) and spec.ndim != 1:
        raise GroupError(
            f"expected a 1-D DeviceMesh, got {spec.ndim} dimensions {spec.mesh_dim_names}: slice one, mesh['name']"
        )


def _is_known(spec: ProcessGroup) -> bool:
    return (
        spec is None
        or _package(spec) in ("mpi4py", "horovod")  # before Communicator: asking COMM_NULL for its rank is an error
        or isinstance(spec, (str, int, LostGroup, dist.ProcessGroup, DeviceMesh, Communicator))
    )


def _package(spec: ProcessGroup) -> str:
    return str(type(spec).__module__).split(".")[0]


def key_of(spec: ProcessGroup) -> str:
    """Return the string that names the group `spec` in this process. Never communicates.

    Raises:
        GroupError: `spec` can name no group.
    """
    if spec is None or spec == "world":
        return "world"
    if isinstance(spec, BaseCommunicator):
        return spec.key
    if torch.compiler.is_compiling():
        return _key_in_trace(spec)
    return _key_of(spec)


def _key_of(spec: ProcessGroup) -> str:
    known = _keys.get(id(spec))
    if known is not None:
        return known
    check_spec(spec)
    if isinstance(spec, LostGroup):
        return f"{_LOST}{spec.description}"
    if spec is dist.GroupMember.NON_GROUP_MEMBER:
        return _OUTSIDE
    if isinstance(spec, (str, int)):
        return str(spec)
    if isinstance(spec, DeviceMesh):
        return _OUTSIDE if spec.get_coordinate() is None else key_of(spec.get_group())
    if _package(spec) == "mpi4py":
        return _key_of_mpi(spec)
    if isinstance(spec, dist.ProcessGroup) and dist.is_initialized() and spec is dist.group.WORLD:
        return "world"
    return _key_of_handle(spec)


def _key_in_trace(spec: ProcessGroup) -> str:
    """As `_key_of`; but of torch's groups a trace of torch.compile sees no more than the name."""
    if isinstance(spec, DeviceMesh):
        return _key_in_trace(spec.get_group())
    if isinstance(spec, dist.ProcessGroup):
        return _key_of_name(spec.group_name)  # type: ignore[no-any-return]
    return _constant_key_of(spec)  # type: ignore[no-any-return]


_constant_key_of = torch.compiler.assume_constant_result(_key_of)  # type: ignore[no-untyped-call]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_of_name(name: str) -> str:
    torch_distributed: Any = dist.distributed_c10d
    return _key_of(torch_distributed._resolve_process_group(name))


_LOST, _OUTSIDE = "lost ", "outside"


def communicator(key: str) -> BaseCommunicator:
    """Return the communicator of the group that `key_of` named.

    It is made at the first call, which is collective over the group ("node", int: over the whole world, whose ranks
    make all parts in one order), and kept. `"node"` and int are the ranks of one host, or consecutive ranks, so many at
    a time, the last part taking what is left (9 ranks in groups of 4: 4, 4, 1).

    Raises:
        GroupError: there is no such group in this process (any more), or it does not hold this rank.
        BackendError: the package behind the handle is missing.
    """
    if key == "world":
        return _world_or_warning()
    native = _natives.get(key)
    if native is not None:
        return native.communicator()
    if key == "node" or key.isdecimal() or key.startswith(_PARTS):
        return _part(key)
    comm = by_key.get(key)
    if comm is None:
        raise _no_group(key)
    return comm


def _no_group(key: str) -> GroupError:
    if key == _OUTSIDE:
        return GroupError("this rank is not in the process group: give it one of its own")
    if key.startswith(_LOST):
        return GroupError(
            f"the layer's process group (a {key.removeprefix(_LOST)}) was not saved with it, since a handle means "
            "nothing in another process: set layer.process_group, to None for the world"
        )
    return GroupError(f"the process group {key!r} does not exist any more: give one that does, or None for the world")


def resolve(spec: ProcessGroup) -> BaseCommunicator:
    """Return the communicator of the group `spec`: `communicator(key_of(spec))`."""
    return spec if isinstance(spec, BaseCommunicator) else communicator(key_of(spec))


class Group:
    """A layer's process group: the specification as given, and its key.

    Deep copies share it. A pickle keeps what means the same elsewhere (None, "world", "node", int) and otherwise a
    `LostGroup`, which is an error when it is used, never silently another group.
    """

    def __init__(self, spec: ProcessGroup = None) -> None:
        self.key = key_of(spec)
        # torch's groups are torch's to keep: its threads and sockets go with the last reference.
        self._spec = _reference(spec) if isinstance(spec, dist.ProcessGroup) else lambda: spec
        self._kind = type(spec).__name__

    @property
    def spec(self) -> ProcessGroup:
        """The specification; a `LostGroup` where it was a process group that is gone."""
        spec = self._spec()
        if spec is None and self._kind != "NoneType":
            return "world" if self.key == "world" else LostGroup(f"{self._kind} that was destroyed")
        return spec

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[type[Group], tuple[ProcessGroup]]:
        spec = "world" if self.key == "world" and self._kind != "NoneType" else self.spec
        portable = spec is None or isinstance(spec, (str, int, LostGroup, SingleProcess))
        return Group, (spec if portable else LostGroup(type(spec).__name__),)
