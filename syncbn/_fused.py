"""The fast path: one autograd.Function over a replica's kernels and a communicator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _composed
from ._composed import Normalized
from ._statistics import statistics
from .comm import Communicator
from .kernels import Kernels


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Communicator, kernels: Kernels
) -> Normalized:
    """Do what `_composed.sync_batch_norm` does, with the same collectives, in four passes over memory.

    For backward it keeps `x` and 2C numbers (mean, 1/√(σ²+ε)) beside the count; never the running statistics, so that
    those may move meanwhile. A backward that is itself to be differentiated (`create_graph=True`) differentiates the
    composed definition instead.
    """
    return Normalized(*_SyncBatchNorm.apply(x, weight, bias, eps, comm, kernels))  # type: ignore[no-untyped-call]


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        comm: Communicator,
        kernels: Kernels,
    ) -> tuple[Tensor, ...]:
        count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        total = comm.all_reduce(torch.cat([kernels.moments(x), count]))
        mean, variance, invstd = statistics(total, eps)
        count = total[-1:]
        y = kernels.normalize(x, mean, invstd, weight, bias)
        ctx.save_for_backward(x, weight, bias, mean, invstd, count)
        ctx.eps, ctx.comm, ctx.kernels = eps, comm, kernels
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, count = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if dy is None:
            dy = torch.zeros_like(x)  # the peers' collective waits for this rank all the same
        if torch.is_grad_enabled():
            grads = _differentiable_backward(ctx, dy, x, weight, bias)
            return *grads, None, None, None
        sums = ctx.kernels.backward_sums(dy, x, mean, invstd)
        dbias, dweight = sums.chunk(2)  # this replica's share, on purpose
        dbias = dbias.to(bias.dtype) if needs_bias else None
        dweight = dweight.to(weight.dtype) if needs_weight else None
        dx = None
        if needs_x:
            total = ctx.comm.all_reduce(sums.clone())
            dx = ctx.kernels.backward_input(dy, x, mean, invstd, weight, total, count)
        return dx, dweight, dbias, None, None, None


class _Recalled:
    """A communicator whose first all-reduce is known: the forward has made it."""

    def __init__(self, comm: Communicator, total: Tensor) -> None:
        self.rank, self.size, self._comm = comm.rank, comm.size, comm
        self._known: Tensor | None = total

    def all_reduce(self, x: Tensor) -> Tensor:
        known, self._known = self._known, None
        return self._comm.all_reduce(x) if known is None else known


def _differentiable_backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients as differentiable functions of dy, x and weight, by autograd through the definition."""
    *_, mean, invstd, count = ctx.saved_tensors
    variance = invstd.reciprocal().square() - ctx.eps
    total = torch.cat([mean * count, (variance + mean.square()) * count, count]).detach()
    y = _composed.sync_batch_norm(x, weight, bias, ctx.eps, _Recalled(ctx.comm, total)).y
    candidates: tuple[Any, ...] = (x, weight, bias)
    inputs = [t for t, needed in zip(candidates, ctx.needs_input_grad, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[:3])
