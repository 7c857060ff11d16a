"""The definition in plain torch operations: any device, differentiable to any order, compilable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._statistics import Running, local_sums, mean_and_variance, refuse_one_value, update_running
from .comm import Communicator


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Communicator, running: Running | None
) -> Tensor:
    """Normalise `x` (N, C, *) with the moments of all replicas; then move the `running` statistics, if any.

    Everything works on d = x - p with p this replica's own mean: sums of d do not cancel, and neither does
    y = γ/√(σ²+ε)·(d - (μ - p)) + β, however far the mean is from zero.

    Collectives: one float64 all-reduce of 2C+1 numbers, one of 2C in a backward that needs dx.
    """
    dims = [0, *range(2, x.dim())]
    channel = [1, -1] + [1] * (x.dim() - 2)
    values = _KeepLayout.apply(x).to(compute_dtype(x))  # type: ignore[no-untyped-call]
    count = x.numel() // x.shape[1]  # values per channel here
    pivot = values.detach().sum(dims) / max(count, 1)  # a constant to autograd: the result does not depend on it
    centred = values - pivot.view(channel)

    n = torch.full((1,), count, dtype=torch.float64, device=x.device)
    sums, n = all_reduce_sums(local_sums(centred, pivot, count), n, comm)
    total = torch.cat([sums, n])
    refuse_one_value(total)
    mean, variance = mean_and_variance(total)

    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = (pivot - mean) * scale
    if bias is not None:
        shift = shift + bias
    y: Tensor = centred * scale.to(values.dtype).view(channel) + shift.to(values.dtype).view(channel)
    if running is not None:
        update_running(running, total.detach())
    return y.to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the work per value: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def all_reduce_sums(sums: Tensor, constants: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """All-reduce two float64 vectors in one collective, differentiable to any order in the first.

    The sum over the replicas is its own adjoint: with S = Σ_r s_r on every replica, dL/ds_r = Σ_q dL_q/dS. So the
    backward is the forward, of `sums` alone.
    """
    return _AllReduce.apply(sums, constants, comm)  # type: ignore[no-any-return, no-untyped-call]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(sums: Tensor, constants: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
        total = comm.all_reduce(torch.cat([sums, constants]))
        # Clones: outputs of a Function must not be views of one another.
        total_sums, total_constants = (part.clone() for part in total.tensor_split([sums.numel()]))
        return total_sums, total_constants

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Communicator], output: tuple[Tensor, Tensor]) -> None:
        ctx.comm = inputs[2]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce_sums(grad, grad.new_empty(0), ctx.comm)[0], None, None


class _KeepLayout(torch.autograd.Function):
    """The identity, whose gradient has the memory format of its input, whatever that of the output's gradient is."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.memory_format = torch._prims_common.suggest_memory_format(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=ctx.memory_format)
