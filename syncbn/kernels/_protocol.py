"""What one replica does to its own tensors: four pure functions. Knows nothing of replicas."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """Four functions over x, dy (N, C, *); a module can implement it.

    Statistics are float64 (C,) or (2C,); weight and bias (C,) of any floating dtype, or None for 1 and 0. A result of
    the size of `x` has its dtype and memory format. N, or a dimension of *, may be 0.

    Attributes:
        DTYPES: the dtypes of x and dy that they take.
    """

    DTYPES: frozenset[torch.dtype]

    def moments(self, x: Tensor) -> Tensor:
        """Return `[Σx, Σx²]`, float64 (2C,), summed about local pivots so that nothing cancels."""

    def normalize(self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return weight·(x - mean)·invstd + bias, dtype and memory format of `x`."""

    def backward_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        """Return `[Σdy, Σdy·x̂]`, float64 (2C,), with x̂ = (x - mean)·invstd."""

    def backward_input(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
    ) -> Tensor:
        """Return weight·invstd·(dy - T1/N - x̂·T2/N) for `sums` = [T1, T2] (2C,) and N = `count` (1,), like `x`."""
