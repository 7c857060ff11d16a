"""The fast path: one autograd.Function over a replica's kernels and a communicator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _composed
from ._statistics import Running
from .comm import Communicator
from .kernels import Kernels


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    comm: Communicator,
    running: Running | None,
    kernels: Kernels,
) -> Tensor:
    """Do what `_composed.sync_batch_norm` does, with the same collectives, in four passes over memory.

    For backward it keeps `x` and 2C+1 numbers (mean, 1/√(σ²+ε), count); never the running statistics, so that
    those may move meanwhile. A backward that is itself to be differentiated (`create_graph=True`) differentiates the
    composed definition instead.
    """
    return _SyncBatchNorm.apply(x, weight, bias, eps, comm, running, kernels)  # type: ignore[no-any-return, no-untyped-call]


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        comm: Communicator,
        running: Running | None,
        kernels: Kernels,
    ) -> Tensor:
        total = comm.all_reduce(kernels.moments(x))
        y, of = kernels.normalize(x, total, weight, bias, eps, running)
        ctx.save_for_backward(x, weight, bias, of)
        ctx.eps, ctx.comm, ctx.kernels = eps, comm, kernels
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, of = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if dy is None:
            dy = torch.zeros_like(x)  # the peers' collective waits for this rank all the same
        if torch.is_grad_enabled():
            grads = _differentiable_backward(ctx, dy, x, weight, bias)
            return *grads, None, None, None, None
        sums = ctx.kernels.backward_sums(dy, x, of)
        dweight, dbias = _shares(sums, weight if needs_weight else None, bias if needs_bias else None)
        dx = None
        if needs_x:
            dx = ctx.kernels.backward_input(dy, x, of, weight, ctx.comm.all_reduce(sums))
        return dx, dweight, dbias, None, None, None, None


def _shares(sums: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `weight` and `bias`, where given: this replica's share, on purpose.

    They are halves of one copy: the sum over the replicas may take the place of `sums`.
    """
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    if not dtypes:
        return None, None
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.promote_types(*dtypes)
    dbias, dweight = sums.to(dtype, copy=True).chunk(2)
    return None if weight is None else dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


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
    mean, invstd, count = ctx.saved_tensors[-1].tensor_split([x.shape[1], 2 * x.shape[1]])
    variance = invstd.reciprocal().square() - ctx.eps
    total = torch.cat([mean * count, (variance + mean.square()) * count, count]).detach()
    y = _composed.sync_batch_norm(x, weight, bias, ctx.eps, _Recalled(ctx.comm, total), None)
    candidates: tuple[Any, ...] = (x, weight, bias)
    inputs = [t for t, needed in zip(candidates, ctx.needs_input_grad, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad[:3])
