"""Packed sums <-> mean, variance and count; running statistics.

Everything per channel is float64: `S2/N - mean²` cancels catastrophically in float32, and float64 carries counts
exactly up to 2⁵³.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from . import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]


def local_sums(centred: Tensor, pivot: Tensor, count: int) -> Tensor:
    """Return this replica's `[Σx, Σx²]`, float64 (2C,), from values centred about `pivot`.

    With d = x - p:  Σx = Σd + n·p  and  Σx² = Σd² + 2p·Σd + n·p².  The sums of d are taken in the dtype of `centred`,
    where they are small; what is large is added in float64.

    Args:
        centred: x - pivot, (N, C, *), float32 or float64.
        pivot: (C,), of the same dtype, near the mean of this replica's values.
        count: n, values per channel on this replica; may be 0.
    """
    dims = [0, *range(2, centred.dim())]
    d1 = centred.sum(dims).double()
    d2 = centred.square().sum(dims).double()
    p = pivot.double()
    return torch.cat([d1 + count * p, d2 + 2 * p * d1 + count * p * p])


def mean_and_variance(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance, float64 (C,), of `count` (1,) values per channel; zeros for none."""
    s1, s2 = sums.chunk(2)
    n = count.clamp(min=1)
    mean = s1 / n
    return mean, (s2 / n - mean.square()).clamp(min=0)


def statistics(total: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and 1/√(σ²+ε), float64 (C,), from `[Σx, Σx², N]` (2C+1,); without gradient."""
    if total.device.type == "cpu" and _native is not None:  # a few hundred numbers: one call, not ten
        channels = total.numel() // 2
        out = torch.empty((3, channels), dtype=torch.float64)
        _native.statistics(total.data_ptr(), channels, eps, out.data_ptr())
        mean, variance, invstd = out.unbind()
        return mean, variance, invstd
    mean, variance = mean_and_variance(total[:-1], total[-1:])
    return mean, variance, torch.rsqrt(variance + eps)


@torch.no_grad()
def update_running(running: Tensor, value: Tensor, count: Tensor, momentum: float | Tensor) -> None:
    """Move in place: running ← (1 - momentum)·running + momentum·value, in float64; not at all where `count` is 0.

    Never reads a number back to the host, so `momentum` may be a tensor on the device.
    """
    updated = running + momentum * (value - running.double())
    running.copy_(torch.where(count > 0, updated, running))


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    momentum: float | Tensor,
) -> None:
    """Move both buffers, any floating dtype (C,), towards the batch's mean and unbiased variance σ²·N/(N-1)."""
    buffers = [b for b in (running_mean, running_var) if b is not None]
    if all(_is_native(b) for b in (*buffers, mean, variance, count)):
        _update_native(running_mean, running_var, mean, variance, count.item(), float(momentum))
        return
    if running_mean is not None:
        update_running(running_mean, mean, count, momentum)
    if running_var is not None:
        update_running(running_var, variance * (count / (count - 1).clamp(min=1)), count, momentum)


def _is_native(t: Tensor) -> bool:
    """Tell whether the compiled function can work on `t` by its address."""
    return (
        _native is not None
        and type(t) in (Tensor, torch.nn.Buffer)
        and t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.float64)
        and t.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def _update_native(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: float,
    momentum: float,
) -> None:
    unbiased = count / max(count - 1, 1)
    for running, value, factor in ((running_mean, mean, 1.0), (running_var, variance, unbiased)):
        if running is not None and count > 0:
            is_float64 = running.dtype == torch.float64
            address, values = running.data_ptr(), value.data_ptr()
            _native.update_running(address, is_float64, values, running.numel(), momentum, factor)
            torch.autograd.graph.increment_version(running)  # as every in-place operation does


def recomputing() -> bool:
    """Tell whether this forward runs inside a backward, as under torch.utils.checkpoint: statistics moved already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
