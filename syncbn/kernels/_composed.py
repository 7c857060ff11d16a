"""The definition in plain torch operations: any device and dtype, differentiable to any order. Implements `Kernels`.

All work per value is about a pivot p next to the mean, a constant to autograd, since no result depends on it: then
nothing cancels, however far the mean is from zero. It is in float32, or float64 for float64; per channel in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._epilogue import Epilogue
from .._mask import inside, weights_of
from .._statistics import Running, refuse_total, update_running
from .._statistics import statistics as statistics_of


def takes(*tensors: Tensor | None) -> bool:
    """Take everything."""
    return True


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return `[Σwx, Σwx², Σw]`, with weights w = 1 unless there is a `mask`, (N, 1, *) or (N, *).

    With d = x - p and n = Σw, Σwx = Σwd + n·p and Σwx² = Σwd² + 2p·Σwd + n·p².
    """
    values, weights = _wide(x), None
    if mask is None:
        n = torch.full((1,), x.numel() // max(x.shape[1], 1), dtype=torch.float64, device=x.device)
    else:
        weights = weights_of(mask, values)
        values, n = inside(values, weights), weights.sum(dtype=torch.float64).view(1)
    pivot = (_sum(values.detach(), weights) / n.clamp(min=1)).to(values.dtype)
    d, p = values - _view(pivot, x), pivot.double()
    d1, d2 = _sum(d, weights).double(), _sum(d.square(), weights).double()
    return torch.cat([d1 + n * p, d2 + 2 * p * d1 + n * p * p, n])


def normalize(
    x: Tensor, total: Tensor, epilogue: Epilogue, eps: float, running: Running | None
) -> tuple[Tensor, Tensor]:
    """Return y and `[mean, 1/√(σ²+ε), N]`; move the running statistics."""
    refuse_total(total)
    of = statistics_of(total, eps)
    y = epilogue.finish(_affine(x, of, epilogue))
    if running is not None:
        update_running(running, total.detach())
    return _in_format_of(x, y.to(x.dtype)), of


def backward_sums(dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor | None]:
    """Return `[Σdz, Σdz·x̂]`, and dz if there is an activation."""
    mean, invstd, _ = _parts(statistics)
    grads, values = _gradient(dy, x, statistics, epilogue), _wide(x)
    pivot = mean.detach().to(values.dtype)
    t1, t2 = _sum(grads).double(), _sum(grads * (values - _view(pivot, x))).double()
    sums = torch.cat([t1, (t2 + (pivot - mean) * t1) * invstd])
    return sums, None if epilogue.activation is None else _in_format_of(x, grads.to(x.dtype))


def backward_input(
    dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue, sums: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return weight/√(σ²+ε)·(dz - w·(T1 + x̂·T2)/N), with a pivot of dz, too; w as in `moments`."""
    mean, invstd, count = _parts(statistics)
    mean_dy, mean_dy_xhat = (sums / count.clamp(min=1)).chunk(2)
    grads, values = _gradient(dy, x, statistics, epilogue), _wide(x)
    pivot, dy_pivot = mean.detach().to(values.dtype), mean_dy.detach().to(values.dtype)
    dy_scale = invstd if epilogue.weight is None else invstd * epilogue.weight
    scale = -dy_scale * invstd * mean_dy_xhat
    shift = (pivot - mean) * scale + (dy_pivot - mean_dy) * dy_scale
    dy_scale, scale, shift = (_view(k.to(values.dtype), x) for k in (dy_scale, scale, shift))
    pivot, dy_pivot = _view(pivot, x), _view(dy_pivot, x)
    if mask is None:
        dx = (grads - dy_pivot) * dy_scale + (values - pivot) * scale + shift
    else:
        weights = weights_of(mask, values)
        values = inside(values, weights)
        dx = (grads - weights * dy_pivot) * dy_scale + weights * ((values - pivot) * scale + shift)
    return _in_format_of(x, dx.to(x.dtype))


def _gradient(dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
    """Return dz, the gradient of weight·x̂ + bias, in the dtype of the work per value."""
    grads = _wide(dy)
    return grads if epilogue.activation is None else epilogue.gradient(grads, _affine(x, statistics, epilogue))


def _affine(x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
    """Return weight·x̂ + bias = γ/√(σ²+ε)·(d - (μ - p)) + β, in the dtype of the work per value."""
    mean, scale, _ = _parts(statistics)
    values = _wide(x)
    pivot = mean.detach().to(values.dtype)
    scale = scale if epilogue.weight is None else scale * epilogue.weight
    shift = (pivot - mean) * scale
    shift = shift if epilogue.bias is None else shift + epilogue.bias
    return (values - _view(pivot, x)) * _view(scale.to(values.dtype), x) + _view(shift.to(values.dtype), x)


def _wide(x: Tensor) -> Tensor:
    """Return `x` in the dtype of the work per value; what is differentiated gets a gradient in its memory format."""
    return _KeepFormat.apply(x).to(torch.float64 if x.dtype == torch.float64 else torch.float32)  # type: ignore[no-any-return, no-untyped-call]


def _sum(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum all but the channels, (C,)."""
    return (values if weights is None else values * weights).sum([0, *range(2, values.dim())])


def _view(vector: Tensor, x: Tensor) -> Tensor:
    """Return (C,) as it broadcasts over (N, C, *)."""
    return vector.view([1, -1] + [1] * (x.dim() - 2))


def _parts(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, 1/√(σ²+ε) and N, (1,)."""
    channels = statistics.numel() // 2
    mean, invstd, count = statistics.tensor_split([channels, 2 * channels])
    return mean, invstd, count


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


class _KeepFormat(torch.autograd.Function):
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
