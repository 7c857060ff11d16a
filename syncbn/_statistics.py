"""Packed sums <-> mean, variance and count; running statistics.

Everything per channel is float64: `S2/N - mean²` cancels catastrophically in float32, and float64 carries counts
exactly up to 2⁵³.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._compiled import native
from .errors import InputError


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


def mean_and_variance(total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance, float64 (C,), from `[Σx, Σx², N]` (2C+1,); zeros where N is 0."""
    s1, s2 = total[:-1].chunk(2)
    n = total[-1:].clamp(min=1)
    mean = s1 / n
    return mean, (s2 / n - mean.square()).clamp(min=0)


def statistics(total: Tensor, eps: float) -> Tensor:
    """Return `[mean, 1/√(σ²+ε), N]`, float64 (2C+1,), from `[Σx, Σx², N]` (2C+1,), without gradient.

    Raises:
        InputError: N is 1, see `refuse_one_value`.
    """
    if _is_native(total):  # a few hundred numbers: one call, not ten
        out = torch.empty_like(total)
        if native.statistics(total.data_ptr(), total.numel() // 2, eps, out.data_ptr()) == 1:
            raise one_value()
        return out
    mean, variance = mean_and_variance(total)
    refuse_one_value(total)
    return torch.cat([mean, torch.rsqrt(variance + eps), total[-1:]])


def refuse_one_value(total: Tensor) -> None:
    """Raise InputError where `total` ends with N = 1 value per channel over all replicas: the same on each of them.

    On the CPU only: an accelerator would have to wait for the number.
    """
    readable = total.device.type == "cpu" and type(total) is Tensor and not torch.compiler.is_compiling()
    if readable and total[-1].item() == 1:
        raise one_value()


def one_value() -> InputError:
    """Return the error of a batch that has no variance."""
    return InputError("expected more than 1 value per channel over all replicas when training: one has no variance")


class Running(NamedTuple):
    """Running statistics, (C,) of any floating dtype or None, and the weight of the new value, 1 - decay."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float | Tensor


def update_running(running: Running, total: Tensor) -> None:
    """Move both in place, from `total` = `[Σx, Σx², N]`, float64 (2C+1,); not where N is 0.

    running ← (1 - momentum)·running + momentum·value, in float64, with the mean and the unbiased variance σ²·N/(N-1).
    Never reads a number back to the host, so `momentum` may be a tensor on the device.
    """
    if _is_native(total) and all(b is None or _is_native(b) for b in (running.mean, running.var)):
        _update_native(running, total)
    else:
        _update(running, total)


@torch.no_grad()
def _update(running: Running, total: Tensor) -> None:
    mean, variance = mean_and_variance(total)
    count = total[-1:]
    for buffer, value in ((running.mean, mean), (running.var, variance * (count / (count - 1).clamp(min=1)))):
        if buffer is not None:
            updated = buffer + running.momentum * (value - buffer.double())
            buffer.copy_(torch.where(count > 0, updated, buffer))


def _update_native(running: Running, total: Tensor) -> None:
    native.update_running(
        total.data_ptr(), total.numel() // 2, float(running.momentum), *_address(running.mean), *_address(running.var)
    )
    for buffer in (running.mean, running.var):
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)  # as every in-place operation does


def _address(t: Tensor | None) -> tuple[int, bool]:
    """Return address and whether it holds float64; 0 for None."""
    return (0, False) if t is None else (t.data_ptr(), t.dtype == torch.float64)


def _is_native(t: Tensor) -> bool:
    """Tell whether the compiled function can work on `t` by its address."""
    return (
        native is not None
        and t.dtype in (torch.float32, torch.float64)
        and type(t) in (Tensor, torch.nn.Buffer)
        and t.is_cpu
        and t.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def recomputing() -> bool:
    """Tell whether this forward runs inside a backward, as under torch.utils.checkpoint: statistics moved already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
