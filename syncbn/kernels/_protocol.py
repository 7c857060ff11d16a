"""What one replica does to its own tensors: two calls a direction. Knows nothing of replicas."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .._epilogue import Epilogue
from .._statistics import Running


class Kernels(Protocol):
    """Four functions over x, dy (N, C, *), one before and one after each collective; a module can implement it.

    Payloads and statistics are float64. A result of the size of `x` has its dtype and memory format. N, or a dimension
    of *, may be 0. Nothing is read back from an accelerator.

    With x̂ = (x - mean)/√(σ²+ε) and the pre-activation z = weight·x̂ + bias + residual, y = activation(z). The backward
    computes z again from x; dz is the gradient of z, which is dy where there is no activation.
    """

    __name__: str

    def takes(self, *tensors: Tensor | None) -> bool:
        """Tell whether these kernels may work on all of these tensors; None stands for one that is absent."""

    def moments(self, x: Tensor) -> Tensor:
        """Return `[Σx, Σx², n]`, (2C+1,), summed about local pivots so that nothing cancels."""

    def normalize(
        self,
        x: Tensor,
        total: Tensor,
        epilogue: Epilogue,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y and `[mean, 1/√(σ²+ε), N]`, (2C+1,); move the `running` statistics.

        `total` is `[Σx, Σx², N]` over all replicas; Σx² may be infinite, 1/√(σ²+ε) is 0 then.

        Raises:
            InputError: 0 < N <= 1 or N is NaN, and the number lies on the CPU; nothing has moved.
        """

    def backward_sums(
        self, dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor | None]:
        """Return `[Σdz, Σdz·x̂]`, (2C,), and dz, or None where there is no activation.

        Also None, to save memory, where `backward_input` can compute it again: without a residual.
        """

    def backward_input(self, dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue, sums: Tensor) -> Tensor:
        """Return weight/√(σ²+ε)·(dz - T1/N - x̂·T2/N) for `sums` = [T1, T2], (2C,), over all replicas.

        `epilogue` has no residual; where `backward_sums` returned dz, that is `dy` here and there is no activation.
        """
