"""Per-channel arithmetic in plain torch: packed sums <-> mean and variance; running statistics.

Everything is float64: `S2/N - mean²` cancels catastrophically in float32, and float64 carries counts exactly up to 2⁵³.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._plain import are_plain
from .errors import InputError


class Running(NamedTuple):
    """Running statistics, moved in place, as those of nn.BatchNorm.

    Attributes:
        mean: (C,), any floating dtype, or None.
        var: like `mean`.
        batches: num_batches_tracked, 0-d int64: counts one up.
        momentum: weight of the new value, 1 - decay; a tensor stays on its device. None averages all batches equally,
            1/(batches + 1), and moves nothing where `batches` is None.
    """

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None = None
    momentum: float | Tensor | None = 0.1


def mean_and_variance(total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance, float64 (C,), from `[Σx, Σx², N]` (2C+1,); zeros where N is 0."""
    count = total[-1:]
    s1, s2 = (total[:-1] / torch.where(count > 0, count, 1.0)).chunk(2)
    return s1, (s2 - s1.square()).clamp(min=0)


def unbiased(variance: Tensor, count: Tensor) -> Tensor:
    """Return σ²·N/(N-1) from σ²; 0 for one value."""
    return variance * (count / (count - 1).clamp(min=1))


def statistics(total: Tensor, eps: float) -> Tensor:
    """Return `[mean, 1/√(σ²+ε), N]`, float64 (2C+1,), from `[Σx, Σx², N]` (2C+1,)."""
    mean, variance = mean_and_variance(total)
    return torch.cat([mean, torch.rsqrt(variance + eps), total[-1:]])


@torch.no_grad()
def update_running(running: Running, total: Tensor) -> None:
    """Move the running statistics in place, from `total` = `[Σx, Σx², N]`, float64 (2C+1,).

    running ← (1 - momentum)·running + momentum·value, in float64, with the mean and the unbiased variance σ²·N/(N-1).
    N = 0 counts the batch and moves nothing else; N = -1 says that this forward was counted before: nothing moves.
    Never reads a number back to the host.
    """
    count = total[-1]
    momentum = running.momentum
    if running.batches is not None:
        running.batches.add_(count >= 0)
        if momentum is None:
            momentum = running.batches.double().reciprocal()
    if momentum is None or (running.mean is None and running.var is None):
        return
    mean, variance = mean_and_variance(total)
    for buffer, value in ((running.mean, mean), (running.var, unbiased(variance, count))):
        if buffer is not None:
            buffer.add_(torch.where(count > 0, momentum * (value - buffer), 0.0))


def refuse_total(total: Tensor) -> None:
    """Raise InputError where `total` ends with an N that `refuse_count` refuses: the same on all replicas.

    On the CPU only, where reading the number does not wait for a device, and where there is a number.
    """
    if are_plain([total], "cpu"):
        refuse_count(total[-1].item())


def refuse_count(count: float) -> None:
    """Raise InputError where N values per channel over all replicas have no variance: 0 < N <= 1, or NaN."""
    if count > 1 or count <= 0:  # 0: there are none at all; -1: see `once`
        return
    if count != count:  # see `weights_of`
        raise InputError(
            "expected a mask of finite weights that are not negative, got others on at least one replica: look at "
            "(mask < 0).any() and mask.isfinite().all(), or pass a bool mask"
        )
    raise one_value()


def one_value() -> InputError:
    """Return the error of a batch that has no variance."""
    return InputError("expected more than 1 value per channel over all replicas when training: one has no variance")
