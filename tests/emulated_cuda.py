"""PyTorch's batch_norm_* CUDA operations as small CPU functions that check every argument strictly.

The checks are those of ATen's CUDA kernels (aten/src/ATen/native/cuda/Normalization.cu(h)): which dtypes go together,
which arguments are one-dimensional, which layouts are taken. Both torch.nn.SyncBatchNorm's own autograd function and
`syncbn.kernels._torch` run on them, so their calls can be compared where no GPU is at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
calls: list[str] = []


def _per_channel(name: str, t: Tensor | None, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t is None:
        return
    assert t.shape == (x.shape[1],), f"{name}: {tuple(t.shape)} for {x.shape[1]} channels"
    assert t.dtype in dtypes, f"{name}: {t.dtype}, expected one of {dtypes}"
    assert t.is_contiguous(), f"{name} is not contiguous"
    assert t.device == x.device
    assert not t.requires_grad or not torch.is_grad_enabled(), f"{name} requires grad"


def _input(x: Tensor) -> None:
    assert x.dim() >= 2
    assert x.numel() > 0, "the kernels refuse empty tensors"
    assert x.dtype in (*HALVES, torch.float32, torch.float64)
    last = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else False
    last = last or (x.is_contiguous(memory_format=torch.channels_last_3d) if x.dim() == 5 else False)
    assert x.is_contiguous() or last, f"strides {x.stride()}"


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _view(t: Tensor, x: Tensor) -> Tensor:
    return t.view([1, -1] + [1] * (x.dim() - 2))


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    calls.append("batch_norm_stats")
    _input(x)
    values = x.to(_accumulate(x))
    variance, mean = torch.var_mean(values, _dims(x), correction=0)
    if eps == 0:  # InvStd in Normalization.cuh: 0 for 1/0
        return mean, torch.where(variance == 0, 0.0, variance.rsqrt())
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    calls.append("batch_norm_elemt")
    _input(x)
    wide = (_accumulate(x),)
    for name, t in (("weight", weight), ("bias", bias)):
        _per_channel(name, t, x, wide)
    for name, t in (("mean", mean), ("invstd", invstd)):
        _per_channel(name, t, x, wide)
    y = (x.to(wide[0]) - _view(mean, x)) * _view(invstd, x)
    y = y if weight is None else y * _view(weight, x)
    y = y if bias is None else y + _view(bias, x)
    return y.to(x.dtype)


def batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, x_g: bool, weight_g: bool, bias_g: bool
) -> tuple[Tensor | None, ...]:
    calls.append("batch_norm_backward_reduce")
    _input(x)
    _input(dy)
    assert dy.dtype == x.dtype
    assert dy.shape == x.shape
    assert dy.stride() == x.stride(), "dy and x in different layouts"
    wide = (_accumulate(x),)
    for name, t in (("mean", mean), ("invstd", invstd)):
        _per_channel(name, t, x, wide)
    _per_channel("weight", weight, x, (*wide, x.dtype))
    d, xmu = dy.to(wide[0]), x.to(wide[0]) - _view(mean, x)
    sum_dy, sum_dy_xmu = d.sum(_dims(x)), (d * xmu).sum(_dims(x))
    weight_dtype = weight.dtype if weight is not None else wide[0]
    return (
        sum_dy if x_g else None,
        sum_dy_xmu if x_g else None,
        (sum_dy_xmu * invstd).to(weight_dtype) if weight_g else None,
        sum_dy.to(weight_dtype) if bias_g else None,
    )


def batch_norm_backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    calls.append("batch_norm_backward_elemt")
    _input(x)
    _input(dy)
    assert dy.dtype == x.dtype
    assert dy.stride() == x.stride(), "dy and x in different layouts"
    wide = (_accumulate(x),)
    for name, t in (("mean", mean), ("invstd", invstd), ("sum_dy", sum_dy), ("sum_dy_xmu", sum_dy_xmu)):
        _per_channel(name, t, x, wide)
    _per_channel("weight", weight, x, wide)
    assert count.dtype == torch.int32, f"count is {count.dtype}"
    assert 0 < count.sum() < 2**31, f"count is {count.sum()}, which the kernel adds up in int32"
    n = count.sum().to(wide[0])
    xmu = x.to(wide[0]) - _view(mean, x)
    scale = invstd if weight is None else invstd * weight
    dx = dy.to(wide[0]) - _view(sum_dy / n, x) - xmu * _view(invstd.square() * sum_dy_xmu / n, x)
    return (dx * _view(scale, x)).to(x.dtype)


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Chan's merge of (P, C) moments; used by torch.nn.SyncBatchNorm alone."""
    calls.append("batch_norm_gather_stats_with_counts")
    assert counts.dtype == _accumulate(x)
    n = counts.sum()
    share = counts.view(-1, 1) / n
    variance = invstd.square().reciprocal() - eps
    total_mean = (share * mean).sum(0)
    total = (share * (variance + (mean - total_mean).square())).sum(0)
    if running_mean is not None:
        running_mean.lerp_(total_mean.to(running_mean.dtype), momentum)
        running_var.lerp_((total * n / (n - 1)).to(running_var.dtype), momentum)
    return total_mean, (total + eps).rsqrt()


OPERATIONS: tuple[Callable[..., object], ...] = (
    batch_norm_stats,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
    batch_norm_gather_stats_with_counts,
)


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the emulated operations in place of torch's; return the list that records their names."""
    for operation in OPERATIONS:
        monkeypatch.setattr(torch, operation.__name__, operation)
    calls.clear()
    return calls
