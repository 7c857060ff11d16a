"""A world of one: nothing to communicate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._protocol import BaseCommunicator, Communicator
from ._verdict import AGREE


class SingleProcess(BaseCommunicator):
    """The communicator of a single replica: `all_reduce` is the identity.

    Example:
        >>> import torch
        >>> SingleProcess().all_reduce(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    transport = "nothing to send"

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        return x, AGREE

    def end(self, reason: str) -> None:
        """Do nothing: there is nothing to end."""

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return itself: one rank has one part."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SingleProcess, ()  # no handle, nothing to lose
