"""Data-parallel training through the communicator's one verb, for MPI and others that have no DDP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._alike import check_alike, check_plain, device_of, facts_of, problem_with
from ._buckets import buckets, flatten, from_words, parts_of, repeats, to_words, without_repeats
from .comm._groups import ProcessGroup, resolve
from .comm._place import place
from .comm._protocol import BaseCommunicator
from .errors import DTypeError, InputError

_BROADCAST, _AVERAGE, _MEAN = map(place, ("broadcast_parameters", "average_gradients", "global_mean"))
BUCKET_BYTES = 25 * 2**20  # of a collective: large enough for bandwidth, small enough not to double the memory


def broadcast_parameters(module: nn.Module, *, process_group: ProcessGroup = None) -> None:
    """Give every replica the bits of rank 0's parameters and buffers, in place; rank 0's own are not written.

    The all-reduce of rank 0's bytes, four to a float64 number, and of the others' zeros: exact for every dtype, for
    -0.0 and NaN. So it sends twice the bytes of the model, once, and holds 100 to 200 MB meanwhile.

    Args:
        module: of the same structure on every replica. Tied tensors are sent once.
        process_group: see `SyncBatchNorm`.

    Raises:
        InputError: the replicas' tensors differ in name, order, shape, dtype, kind of device or requires_grad. The
            message names the first that does.
        DTypeError: a tensor is not plain memory: a DTensor or another subclass, sparse, quantised, on the meta device.
            The message names it.

    Either is raised on every rank, before anything has changed.

    Collectives: one of 3P numbers among P replicas, one more before an InputError; then, for each dtype and device, at
    most one for each 12.5 MB of tensors and one for the rest.
    """
    send_parameters(module, resolve(process_group), 0)


@torch.no_grad()
def send_parameters(module: nn.Module, comm: BaseCommunicator, source: int) -> None:
    """Do what `broadcast_parameters` does, with those of rank `source`."""
    if comm.size == 1:
        return
    named = [*module.named_parameters(), *module.named_buffers()]
    check_alike(facts_of(named), comm, "parameters and buffers", device_of(named), needed=source)
    check_plain(named)
    tensors = [without_repeats(tensor) for _, tensor in named]
    for bucket in buckets(tensors, lambda tensor: tensor.dtype, BUCKET_BYTES // 2):
        flat = flatten(bucket)
        received = send(flat, comm, source)
        if comm.rank != source:
            for tensor, part in zip(bucket, parts_of(received, bucket), strict=True):
                tensor.copy_(part)


def send(flat: Tensor, comm: BaseCommunicator, source: int) -> Tensor:
    """Return the bits of rank `source`'s vector, which has the same length and dtype on every rank; one all-reduce."""
    words = to_words(flat)
    if comm.rank != source:
        words.zero_()
    return from_words(comm.all_reduce(words, _BROADCAST), len(flat), flat.dtype)


@torch.no_grad()
def average_gradients(module: nn.Module, *, process_group: ProcessGroup = None) -> None:
    """Replace every parameter's `.grad` by its mean over the replicas, as DDP does; call it after backward.

    A parameter without gradient here but with one elsewhere counts as zero and gets the mean; one without gradient
    anywhere stays without. Half and bfloat16 gradients are summed in float32. FSDP2 averages its gradients itself.

    Args:
        module: of the same structure on every replica. Tied parameters count once.
        process_group: see `SyncBatchNorm`.

    Raises:
        InputError, DTypeError: as `broadcast_parameters`, of parameters and of gradients.

    Collectives: one of 3P numbers among P replicas, one more before an InputError, and one of a number for each
    parameter where not all replicas have gradients of the same; then, for each dtype (float32 and below are one) and
    device, at most one for each 25 MB of gradients and one for the rest.
    """
    comm = resolve(process_group)
    if comm.size == 1:
        return
    named = list(module.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    gradients = [(f"{name}.grad", p.grad) for name, p in trained if p.grad is not None]
    facts = facts_of(named) + facts_of([pair for pair in gradients if problem_with(pair[1])])
    here = [p.grad is not None for _, p in trained]
    same_everywhere = check_alike(facts, comm, "parameters", device_of(named), also=here)
    check_plain([*named, *gradients])
    parameters = [p for _, p in trained]
    if not same_everywhere:
        _fill_in_zeros(parameters, comm, device_of(named))
    for p in parameters:
        if p.grad is not None and (repeats(p.grad) or p.grad.is_conj() or p.grad.is_neg()):
            p.grad = p.grad.contiguous().resolve_conj().resolve_neg()  # memory to write to
    for bucket in buckets([p.grad for p in parameters if p.grad is not None], _summed_in, BUCKET_BYTES):
        _average(bucket, comm)


def global_mean(total: Tensor, count: Tensor | float, *, process_group: ProcessGroup = None) -> Tensor:
    """Return the mean over the terms of all replicas: Σ total / Σ count, the loss of the whole batch.

    Replicas hold different numbers of terms (objects, valid pixels, samples). The mean of their means is not the mean
    of the whole batch; this is. Its value is the same on every replica. Its gradient is P/Σcount of `total`'s, so that
    the *mean* over P replicas, which DDP and `average_gradients` form, is the gradient of the whole batch's loss.
    Everything between `total` and the result is float64: it overflows only where the result does.

    Args:
        total: the sum of this replica's terms, with grad; any shape, elementwise.
        count: how many terms that is, one number; may be 0, not everywhere.
        process_group: see `SyncBatchNorm`; the replicas whose gradients are averaged.

    Returns:
        Like `total`; zeros if there are no terms anywhere.

    Raises:
        DTypeError: `total` is not floating, or not a plain tensor (a DTensor).
        InputError: `count` is not one number.

    Collectives: one of numel+1 numbers, also where gradients are off; none in backward.

    Example:
        >>> import torch
        >>> loss = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
        >>> global_mean(loss.sum(), 3)
        tensor(3., grad_fn=<_MeanBackward>)
    """
    if problem_with(total) or not total.is_floating_point():
        raise DTypeError(f"expected a floating-point total, got {problem_with(total) or total.dtype}")
    terms = _one_number(count, total.device)
    comm = resolve(process_group)
    sums = comm.all_reduce(torch.cat([total.detach().double().flatten(), terms]), _MEAN)
    terms = torch.where(sums[-1] == 0, 1.0, sums[-1])
    mean: Tensor = _Mean.apply(total, (sums[:-1] / terms).view(total.shape), comm.size / terms)  # type: ignore[no-untyped-call]
    return mean


class _Mean(torch.autograd.Function):
    """Has the value of `mean`, to the bit and also if it is infinite, and `slope` as its gradient in `total`."""

    @staticmethod
    def forward(total: Tensor, mean: Tensor, slope: Tensor) -> Tensor:
        return mean.to(total.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad.double() * slope).to(grad.dtype), None, None


def _one_number(count: Tensor | float, device: torch.device) -> Tensor:
    number = torch.as_tensor(count, dtype=torch.float64, device=device).detach()
    if number.numel() != 1:
        raise InputError(f"expected one number as count, got shape {tuple(number.shape)}: pass count.sum()")
    return number.reshape(1)


def _fill_in_zeros(parameters: Sequence[Tensor], comm: BaseCommunicator, device: torch.device) -> None:
    """Give a zero gradient to every parameter that has one on another replica only."""
    here = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
    for p, count in zip(parameters, comm.all_reduce(here, _AVERAGE).tolist(), strict=True):
        if p.grad is None and count > 0:
            p.grad = torch.zeros_like(p)


def _summed_in(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _average(bucket: list[Tensor], comm: BaseCommunicator) -> None:
    flat = flatten(bucket).to(_summed_in(bucket[0]))
    numbers = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    mean = comm.all_reduce(numbers, _AVERAGE).div_(comm.size)
    torch._foreach_copy_(bucket, parts_of(mean.view(flat.dtype), bucket))
