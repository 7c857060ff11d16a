"""The definition in plain torch operations: any device, differentiable to any order, compilable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._statistics import Running
from .comm import Communicator
from .kernels import _composed


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Communicator, running: Running | None
) -> Tensor:
    """Normalise `x` (N, C, *) with the moments of all replicas; then move the `running` statistics, if any."""
    sums, n = _composed.moments(x).tensor_split([-1])
    total = torch.cat(all_reduce_sums(sums, n.detach(), comm))
    return _composed.normalize(x, total, weight, bias, eps, running)[0]


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
