"""A world of one: nothing to communicate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._protocol import Communicator, SharedHandle, check_payload


class SingleProcess(SharedHandle):
    """The communicator of a single replica: `all_reduce` is the identity.

    Example:
        >>> import torch
        >>> SingleProcess().all_reduce(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        check_payload(x)
        return x

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return itself: one rank has one part."""
        return self

    def __reduce__(self) -> tuple[type[SingleProcess], tuple[()]]:  # type: ignore[override]
        return SingleProcess, ()  # no handle, nothing to lose
