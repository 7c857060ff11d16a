"""MPI through mpi4py as a communicator. The only file that imports mpi4py, and only when asked to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import BackendError, CollectiveError, GroupError

from ._protocol import Communicator, SharedHandle, check_payload, part_of, wait_until


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        raise BackendError(f"MPI needs mpi4py and an MPI library: pip install 'syncbn[mpi]' ({error})") from error
    return MPI


class MPI(SharedHandle):
    """An mpi4py communicator.

    Works on a duplicate of the user's communicator, so its messages cannot meet the user's. Making it is therefore
    collective over `comm`. From then on an exception that ends this process aborts the whole job (`MPI_Abort`),
    whichever way Python was started: without that the other ranks wait for ever.

    float32 and float64 only: mpi4py sends other dtypes, bfloat16 for one, as raw bytes and adds those.

    Args:
        comm: an mpi4py intracommunicator; None is `COMM_WORLD`.
        timeout: how long a rank waits in one collective before it raises.
        cuda_aware: hand CUDA tensors to MPI as they are. Ask for it only if your MPI is CUDA-aware; otherwise they
            are staged through the host. Neither has been run on a GPU yet.

    Raises:
        BackendError: mpi4py is missing, or MPI was initialised without the thread level `MPI_THREAD_SERIALIZED`
            (autograd calls from threads of its own).
        GroupError: `comm` is null (this rank is not in it) or an intercommunicator.
    """

    def __init__(
        self, comm: Any = None, *, timeout: timedelta = timedelta(minutes=10), cuda_aware: bool = False
    ) -> None:
        mpi = _mpi()
        comm = mpi.COMM_WORLD if comm is None else comm
        if comm == mpi.COMM_NULL:
            raise GroupError("MPI.COMM_NULL: this rank is not in the communicator; give it one that holds it")
        if comm.Is_inter():
            raise GroupError("expected an MPI intracommunicator, got an intercommunicator: pass comm.Merge()")
        if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
            raise BackendError(
                f"MPI was initialised with thread level {mpi.Query_thread()}, syncbn needs MPI_THREAD_SERIALIZED "
                f"({mpi.THREAD_SERIALIZED}) or more: leave mpi4py.rc.thread_level at 'multiple'"
            )
        self.comm = comm.Dup()
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._timeout = timeout
        self._cuda_aware = cuda_aware
        self._in_flight: tuple[Any, Tensor] | None = None
        if mpi.COMM_WORLD.Get_size() > 1:
            _abort_job_on_exception()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the communicator."""
        check_payload(x)
        if self.size == 1:
            return x
        if x.is_cuda and self._cuda_aware:
            torch.cuda.current_stream(x.device).synchronize()  # MPI knows nothing of streams
            return self._sum_in_place(x, x)
        host = x.cpu()  # waits for the current stream; the tensor itself when it is on the CPU
        return self._sum_in_place(host, host.numpy()).to(x.device)

    def _sum_in_place(self, x: Tensor, buffer: Any) -> Tensor:
        mpi = _mpi()
        request = self.comm.Iallreduce(mpi.IN_PLACE, buffer, op=mpi.SUM)
        self._in_flight = (request, x)  # MPI writes to x until the request ends, also when we stop waiting
        if not wait_until(request.Test, self._timeout.total_seconds()):
            raise CollectiveError(
                f"all_reduce of {x.numel()} numbers over {self.size} MPI ranks: rank {self.rank} waited "
                f"{self._timeout.total_seconds():g} s for a peer that died, ended, or did not call"
            )
        self._in_flight = None
        return x

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank."""
        color = list(partition).index(part_of(self.rank, partition))
        part = self.comm.Split(color, key=self.rank)
        try:
            return MPI(part, timeout=self._timeout, cuda_aware=self._cuda_aware)
        finally:
            part.Free()  # MPI() made a duplicate of its own


def attached(comm: Any) -> MPI:
    """Return the communicator made for the mpi4py `comm` before, or make it (collective over `comm`).

    It is kept as an MPI attribute of `comm`: handles are reused after `Free`, attributes end with their communicator.
    """
    mpi = _mpi()
    if comm == mpi.COMM_NULL:
        return MPI(comm)  # raises
    found = comm.Get_attr(_keyval())
    if found is None:
        found = MPI(comm)
        comm.Set_attr(_keyval(), found)
    return found  # type: ignore[no-any-return]


_KEYVAL: int | None = None


def _keyval() -> int:
    global _KEYVAL
    if _KEYVAL is None:
        _KEYVAL = _mpi().Comm.Create_keyval()
    return _KEYVAL


def _abort_job_on_exception() -> None:
    """Make an uncaught exception end every rank of the job, not this one alone."""
    previous = sys.excepthook
    if getattr(previous, "aborts_mpi_job", False):
        return

    def excepthook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        previous(kind, value, traceback)
        sys.stdout.flush()
        sys.stderr.flush()
        _mpi().COMM_WORLD.Abort(1)

    excepthook.aborts_mpi_job = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
