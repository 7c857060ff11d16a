"""Horovod as a communicator. The only file that imports horovod, and only when asked to."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPConnection
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import BackendError, CollectiveError, GroupError, PeerLostError

from ._carried import Carrying
from ._protocol import LOST, Communicator, part_of, wait_until


def _hvd() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise BackendError(
            f"Horovod needs a build against the installed torch: syncbn install-horovod ({error})"
        ) from error
    return hvd


class Horovod(Carrying):
    """A Horovod process set.

    Horovod matches tensors by name, keeps what it negotiated under that name, and names the tensor when ranks stall. A
    collective is called `syncbn.<number of elements>`, whichever layer it is of: the same on every rank, whatever else
    a rank did before.

    Horovod ends as a whole: a failure on one process set breaks the communicators of all. Process sets that `split`
    registers stay until Horovod is shut down, which `close` does if `init` started it.

    Args:
        process_set: a registered `horovod.torch.ProcessSet`; None is the global one.
        timeout: Horovod's own (`init` sets them) come first and say more. A rank waits twice as long: Horovod 0.28.1
            may drop a tensor that is enqueued while its background thread ends, and would then wait for ever.

    Raises:
        BackendError: horovod is not installed for this torch.
        GroupError: Horovod is not initialised, or this rank is not in the process set.
    """

    transport = "horovod"
    backends = frozenset({"horovod"})

    def __init__(self, process_set: Any = None, *, timeout: timedelta = timedelta(minutes=10)) -> None:
        hvd = _hvd()
        if not hvd.is_initialized():
            raise GroupError("Horovod is not initialised: call syncbn.init() or horovod.torch.init()")
        chosen = hvd.global_process_set if process_set is None else process_set
        if chosen.process_set_id is None:
            raise GroupError(f"{chosen} is not registered: call horovod.torch.add_process_set on every rank")
        if not chosen.included():
            raise GroupError(f"rank {hvd.rank()} is not in {chosen}: give it a process set that holds it")
        super().__init__(chosen.rank(), chosen.size())
        self.process_set = chosen
        self.members = list(range(hvd.size())) if chosen.ranks is None else list(chosen.ranks)
        self.timeout = timeout
        self._started = False  # Horovod itself, and so ends it
        _count_ends(hvd)
        self._world = _ended
        _all.add(self)

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
        started = not hvd.is_initialized()
        if started:
            _forget_world_before(seconds)
        hvd.init()
        comm = cls(timeout=timeout)
        comm._started = started
        return comm

    def exists(self) -> bool:
        """Tell whether Horovod runs, has not been shut down meanwhile, and knows the process set."""
        return self._world == _ended and bool(_hvd().is_initialized()) and _size(self.process_set) == self.size

    def successor(self) -> Horovod | None:
        """Return the communicator of the world that came after this one, where Horovod was started again."""
        return Horovod(timeout=self.timeout) if _hvd().is_initialized() else None

    def _check(self, x: Tensor) -> None:
        if not self.exists():
            self.end("Horovod was shut down, or the process set removed")

    def _add(self, x: Tensor) -> Tensor:
        hvd, seconds = _hvd(), 2 * self.timeout.total_seconds()
        # Horovod averages unless told otherwise. It keeps both tensors until it is done with them.
        handle = hvd.allreduce_async(x, op=hvd.Sum, name=f"syncbn.{x.numel()}", process_set=self.process_set)
        if not wait_until(lambda: hvd.poll(handle), seconds, self):
            raise RuntimeError(f"no answer from Horovod within {seconds:g} s")
        total: Tensor = hvd.synchronize(handle)  # HorovodInternalError is a RuntimeError
        return total

    def join(self) -> int:
        """Add zeros to whatever the other ranks sum, until every rank has called; return the rank that did last.

        Of the global process set only.
        """
        hvd = _hvd()
        try:
            last = int(hvd.join(torch.cuda.current_device() if torch.cuda.is_available() else -1))
        except RuntimeError as error:
            self.fail(f"waiting for the other ranks' last batches failed {self._here()}: {LOST}: {error}")
            raise PeerLostError(self._reason) from error
        self._calls.clear()  # a rank that waits here does not count
        return last

    def fail(self, reason: str, *, peers_know: bool = False) -> None:
        """Break, and with this every communicator over Horovod."""
        for comm in list(_all):
            if comm.state == "open":
                comm.state, comm._reason = "broken", reason

    def _release(self) -> None:
        if self._started and self.exists():  # else Horovod was started again, by hvd.elastic for one
            _hvd().shutdown()
            _process_sets.clear()

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank; every rank registers every process set."""
        hvd = _hvd()
        to_world = self.process_set.ranks if self.process_set.ranks is not None else list(range(hvd.size()))
        sets = [_registered([to_world[r] for r in part]) for part in partition]
        mine = list(partition).index(part_of(self.rank, partition))
        return Horovod(sets[mine], timeout=self.timeout)


_all: weakref.WeakSet[Horovod] = weakref.WeakSet()
_ended = 0  # worlds of Horovod's in this process


def _count_ends(hvd: Any) -> None:
    """Have Horovod's shutdown counted: its next world may give this process the same rank, of as many."""
    basics = hvd.mpi_ops._basics  # whose shutdown hvd.elastic calls, too
    shutdown = basics.shutdown
    if getattr(shutdown, "is_counted", False):
        return

    def counted() -> None:
        global _ended
        _ended += 1
        shutdown()

    counted.is_counted = True  # type: ignore[attr-defined]
    basics.shutdown = counted


_starts = 0


def _forget_world_before(seconds: float) -> None:
    """Make ready to start Horovod again in the same processes. Every rank calls this.

    Under horovodrun with Gloo (0.28.1) the addresses of the ranks of the time before are often still in its store. Who
    reads them cannot connect, and Gloo aborts the process. It drops a scope when all its ranks have asked for it.
    """
    global _starts
    _starts += 1
    if _starts == 1 or "HOROVOD_GLOO_RENDEZVOUS_ADDR" not in os.environ:
        return
    env = {name: os.environ[f"HOROVOD_{name}"] for name in ("HOSTNAME", "RANK", "LOCAL_RANK", "CROSS_RANK")}
    _meet(f"syncbn.{_starts}.ended", seconds)
    for scope, key in (
        ("global", env["RANK"]),
        (f"local_{env['HOSTNAME']}", env["LOCAL_RANK"]),
        (f"cross_{env['LOCAL_RANK']}", env["CROSS_RANK"]),
    ):
        while _ask_store("GET", scope, key):
            _ask_store("DELETE", scope, key)
    _meet(f"syncbn.{_starts}.forgotten", seconds)


def _meet(scope: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    _ask_store("PUT", scope, os.environ["HOROVOD_RANK"])
    for rank in range(int(os.environ["HOROVOD_SIZE"])):
        while not _ask_store("GET", scope, str(rank)):
            if time.monotonic() > deadline:
                raise CollectiveError(f"rank {rank} did not call syncbn.init within {seconds:g} s")
            time.sleep(0.005)


def _ask_store(method: str, scope: str, key: str) -> bool:
    """Ask horovodrun's store; False if it does not have the key."""
    host, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
    store = HTTPConnection(host, int(port), timeout=30)
    try:
        store.request(method, f"/{scope}/{key}", body=b"1" if method == "PUT" else None)
        return store.getresponse().status == HTTPStatus.OK
    finally:
        store.close()


def _size(process_set: Any) -> int | None:
    """None: it was removed, or Horovod was shut down, and started again perhaps."""
    if process_set.process_set_id is None:
        return None
    try:
        return int(process_set.size())
    except ValueError:
        return None


_process_sets: dict[tuple[int, ...], Any] = {}  # Horovod refuses to register the same ranks twice


def _registered(ranks: list[int]) -> Any:
    """Return the process set of `ranks`, registered at the first call."""
    hvd = _hvd()
    if ranks == list(range(hvd.size())):
        return hvd.global_process_set
    known = _process_sets.get(tuple(ranks))
    if known is not None and _size(known) == len(ranks):
        return known
    try:
        _process_sets[tuple(ranks)] = hvd.add_process_set(ranks)
    except ValueError as error:
        raise GroupError(
            f"Horovod could not register a process set for ranks {ranks}; if you registered it yourself, pass it as "
            f"process_group; if you called horovod.torch.init() yourself, set HOROVOD_DYNAMIC_PROCESS_SETS=1: {error}"
        ) from error
    return _process_sets[tuple(ranks)]
