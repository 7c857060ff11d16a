"""What one replica does to its own tensors: four pure functions. Knows nothing of replicas."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """Four functions over x, dy (N, C, *); a module can implement it.

    Sums and statistics are float64: `statistics` is `[mean, 1/√(σ²+ε), N]`, (2C+1,), over all replicas. weight and bias
    are (C,) of any floating dtype, or None for 1 and 0. A result of the size of `x` has its dtype and memory format. N,
    or a dimension of *, may be 0.

    Attributes:
        DTYPES: the dtypes of x and dy that they take.
    """

    DTYPES: frozenset[torch.dtype]

    def moments(self, x: Tensor) -> Tensor:
        """Return `[Σx, Σx², n]`, float64 (2C+1,), summed about local pivots so that nothing cancels."""

    def normalize(self, x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return weight·(x - mean)/√(σ²+ε) + bias, dtype and memory format of `x`."""

    def backward_sums(self, dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
        """Return `[Σdy, Σdy·x̂]`, float64 (2C,), with x̂ = (x - mean)/√(σ²+ε)."""

    def backward_input(self, dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
        """Return weight/√(σ²+ε)·(dy - T1/N - x̂·T2/N) for `sums` = [T1, T2] (2C,) over all replicas, like `x`."""
