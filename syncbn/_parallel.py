"""Data-parallel training through the communicator's one verb, for MPI and others that have no DDP."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .comm import Communicator
from .comm._groups import ProcessGroup, resolve
from .errors import DTypeError, InputError

BUCKET_BYTES = 25 * 2**20  # large enough for bandwidth, small enough not to double the memory


@torch.no_grad()
def broadcast_parameters(module: nn.Module, *, process_group: ProcessGroup = None) -> None:
    """Give every replica rank 0's parameters and buffers, in place.

    The all-reduce of rank 0's values and the others' zeros; so it is exact, and NaNs elsewhere do no harm.

    Args:
        module: of the same structure on every replica.
        process_group: see `SyncBatchNorm`.

    Raises:
        InputError: the replicas' tensors differ in number, shape or dtype (on every rank). Nothing has changed then.
        DTypeError: a complex or sparse tensor.

    Collectives: one of 2 numbers, then one for each 25 MB and dtype.
    """
    comm = resolve(process_group)
    tensors = [*module.parameters(), *module.buffers()]
    if comm.size == 1:
        return
    _check_alike(tensors, tensors, comm, "parameters and buffers")
    for bucket in _buckets(tensors):
        flat = _flatten(bucket) if comm.rank == 0 else torch.zeros_like(_flatten(bucket))
        _unflatten(comm.all_reduce(flat), bucket)


@torch.no_grad()
def average_gradients(module: nn.Module, *, process_group: ProcessGroup = None) -> None:
    """Replace every parameter's `.grad` by its mean over the replicas, as DDP does; call it after backward.

    A parameter without gradient here but with one elsewhere counts as zero and gets the mean; one without gradient
    anywhere stays without. Half and bfloat16 gradients are summed in float32.

    Args:
        module: of the same structure on every replica.
        process_group: see `SyncBatchNorm`.

    Raises:
        InputError: the replicas' parameters differ in number, shape or dtype (on every rank). Nothing has changed then.
        DTypeError: a complex or sparse gradient.

    Collectives: two small ones, then one for each 25 MB and dtype.
    """
    comm = resolve(process_group)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if comm.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    _check_alike(parameters, gradients, comm, "parameters that require grad")
    here = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=_device_of(parameters))
    somewhere = comm.all_reduce(here).tolist()
    for p, count in zip(parameters, somewhere, strict=True):
        if p.grad is None and count > 0:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets(p.grad for p in parameters if p.grad is not None):
        _unflatten(comm.all_reduce(_flatten(bucket)).div_(comm.size), bucket)


def global_mean(total: Tensor, count: Tensor | float, *, process_group: ProcessGroup = None) -> Tensor:
    """Return the mean over the terms of all replicas: Σ total / Σ count, the loss of the whole batch.

    Replicas hold different numbers of terms (objects, valid pixels, samples). The mean of their means is not the mean
    of the whole batch; this is. Its value is the same on every replica. Its gradient is P/Σcount of `total`'s, so that
    the *mean* over P replicas, which DDP and `average_gradients` form, is the gradient of the whole batch's loss.

    Args:
        total: the sum of this replica's terms, with grad; any shape, elementwise.
        count: how many terms that is; may be 0, not everywhere.
        process_group: see `SyncBatchNorm`; the replicas whose gradients are averaged.

    Returns:
        Like `total`; zeros if there are no terms anywhere.

    Raises:
        DTypeError: `total` is not floating.

    Collectives: one of numel+1 numbers, also where gradients are off; none in backward.

    Example:
        >>> import torch
        >>> loss = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
        >>> global_mean(loss.sum(), 3)
        tensor(3., grad_fn=<AddBackward0>)
    """
    if not total.is_floating_point():
        raise DTypeError(f"expected a floating-point total, got {total.dtype}")
    comm = resolve(process_group)
    here = torch.cat([total.detach().double().flatten(), _as_vector(count, total.device)])
    sums = comm.all_reduce(here)
    terms = torch.where(sums[-1] > 0, sums[-1], 1.0)
    mean = (sums[:-1] / terms).view(total.shape).to(total.dtype)
    share = total * (comm.size / terms).to(total.dtype)
    return mean + (share - share.detach())  # the value is mean's, to the bit; the gradient is share's


def _as_vector(number: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64, device=device).detach().reshape(1)


def _device_of(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _check_alike(tensors: Sequence[Tensor], sent: Sequence[Tensor], comm: Communicator, what: str) -> None:
    """Compare the replicas' shapes and dtypes, so that a difference is an error on all and not garbage or a hang.

    Whether what will be `sent` can be (dense, real) is compared too: no replica may raise alone.

    All numbers h_r are equal if and only if (Σh)² = P·Σh². With h < 2²⁰ float64 holds the sums
    exactly up to 2¹³ replicas.
    """
    unfit = [t for t in sent if t.is_complex() or t.layout != torch.strided]
    signature = str([(tuple(t.shape), t.dtype) for t in tensors] + [bool(unfit)])
    h = zlib.crc32(signature.encode()) >> 12
    s1, s2 = comm.all_reduce(torch.tensor([h, h * h], dtype=torch.float64, device=_device_of(tensors))).tolist()
    if int(s1) ** 2 != comm.size * int(s2):
        raise InputError(
            f"the replicas' {what} differ in number, shape, dtype or layout; rank {comm.rank} has {len(tensors)} of "
            f"{sum(t.numel() for t in tensors)} elements: build the same model on every rank"
        )
    if unfit:
        raise DTypeError(f"expected dense real tensors, got {unfit[0].dtype} in layout {unfit[0].layout}")


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one wire dtype and device, 25 MB at a time, in an order that every replica shares."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((_wire_dtype(tensor), tensor.device), []).append(tensor)
    for (dtype, _), kind in by_kind.items():
        bucket: list[Tensor] = []
        for tensor in kind:
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) * dtype.itemsize >= BUCKET_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _wire_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32 where that is exact or the gradient's own precision; float64 also for integers (up to 2⁵³)."""
    return torch.float32 if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float64


def _flatten(bucket: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).to(_wire_dtype(t)) for t in bucket])


def _unflatten(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))
