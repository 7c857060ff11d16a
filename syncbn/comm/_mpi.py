"""MPI through mpi4py as a communicator. The only file that imports mpi4py, and only when asked to."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import BackendError, GroupError

from ._protocol import BaseCommunicator, Communicator, check_timeout, kind_of, part_of, wait_until
from ._verdict import AGREE, OTHER_PLACE, OTHER_VECTOR, all_alike, exact_bits


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        raise BackendError(f"MPI needs mpi4py and an MPI library: pip install 'syncbn[mpi]' ({error})") from error
    return MPI


_HEADER = struct.Struct("=4d")  # h and h² of the signature, and of the kind of vector
_FIRST = 513  # numbers that travel with the header: those of a layer of 256 channels


class MPI(BaseCommunicator):
    """An mpi4py communicator.

    Works on a duplicate of the user's communicator, so its messages cannot meet the user's. Making it is therefore
    collective over `comm`. From then on an exception that ends this process aborts the whole job (`MPI_Abort`),
    whichever way Python was started: without that the other ranks wait for ever.

    A wait that is abandoned, at its deadline or by Ctrl-C, breaks the communicator; MPI may write to the tensor even
    then, so its memory is kept. `close` frees the duplicate; so does `Free` of the user's communicator, where syncbn
    looked it up as a `process_group`.

    One message for up to 513 numbers, a layer of 256 channels; a longer vector takes two.

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

    transport = "mpi"
    backends = frozenset({"mpi"})

    def __init__(
        self, comm: Any = None, *, timeout: timedelta = timedelta(minutes=10), cuda_aware: bool = False
    ) -> None:
        check_timeout(timeout)
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
        super().__init__(comm.Get_rank(), comm.Get_size())
        self.comm = comm.Dup()
        self.timeout = timeout
        self._cuda_aware = cuda_aware
        self._first = bytearray(_HEADER.size + 8 * _FIRST)
        self._data = torch.frombuffer(self._first, dtype=torch.float64, offset=_HEADER.size)
        self.members = comm.group.Translate_ranks(None, mpi.COMM_WORLD.group)
        if mpi.COMM_WORLD.Get_size() > 1:
            _abort_job_on_exception()

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        aware = x.is_cuda and self._cuda_aware
        if aware:
            torch.cuda.current_stream(x.device).synchronize()  # MPI knows nothing of streams
        here = x if aware else x.cpu()  # waits for the current stream; x itself on the CPU
        flat = here.view(-1)
        first = flat[: 0 if aware else _FIRST]
        verdict = self._add_first(first, kind_of(x), signature)
        rest = flat[first.numel() :]
        if rest.numel() and verdict != OTHER_VECTOR:
            self._add(rest)
        return here.to(x.device), verdict

    def _add_first(self, x: Tensor, kind: int, signature: int) -> int:
        """Add what travels with the header, in place; return the verdict.

        MPI takes what it gets: so the first message has one length for all, and says of what kind the vector is.
        """
        bits = exact_bits(self.size)
        h, k = signature % (1 << bits), kind % (1 << bits)
        _HEADER.pack_into(self._first, 0, h, h * h, k, k * k)
        data = self._data[: x.numel()]
        data.copy_(x)
        self._add([self._first, _mpi().DOUBLE])
        h, h2, k, k2 = map(int, _HEADER.unpack_from(self._first))
        if not all_alike(self.size, k, k2):
            return OTHER_VECTOR
        x.copy_(data)
        return AGREE if all_alike(self.size, h, h2) else OTHER_PLACE

    def _add(self, buffer: Any) -> None:
        seconds = self.timeout.total_seconds()
        request = self.comm.Iallreduce(_mpi().IN_PLACE, buffer, op=_mpi().SUM)
        _written_to[id(request)] = request, buffer
        if not wait_until(request.Test, seconds, self):
            raise RuntimeError(f"no answer within {seconds:g} s")
        del _written_to[id(request)]

    def _release(self) -> None:
        if self.state == "open" and not _mpi().Is_finalized():  # else a collective may be pending in it
            self.comm.Free()

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank."""
        color = list(partition).index(part_of(self.rank, partition))
        part = self.comm.Split(color, key=self.rank)
        try:
            return MPI(part, timeout=self.timeout, cuda_aware=self._cuda_aware)
        finally:
            part.Free()  # MPI() made a duplicate of its own


_written_to: dict[int, Any] = {}  # MPI writes to these until its requests end, also when nobody waits any more


def label(comm: Any, make: Callable[[], str]) -> str:
    """Return the label of the mpi4py `comm`: `make()` at the first call. Local.

    It is kept as an MPI attribute: handles are reused after `Free`, attributes end with their communicator.
    """
    mpi = _mpi()
    if comm == mpi.COMM_NULL:
        return "MPI.COMM_NULL"
    found: str | None = comm.Get_attr(_keyval())
    if found is None:
        found = make()
        comm.Set_attr(_keyval(), found)
    return found


on_free: list[Callable[[str], None]] = []  # called with the label of a communicator that its user frees
_KEYVAL: int | None = None


def _keyval() -> int:
    global _KEYVAL
    if _KEYVAL is None:
        _KEYVAL = _mpi().Comm.Create_keyval(delete_fn=_freed)
    return _KEYVAL


def _freed(comm: Any, keyval: int, label: str) -> None:
    for tell in on_free:
        tell(label)


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
