"""An error with its bound, and the largest of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncbn.comm import Communicator

from ._job import gather


@dataclass(frozen=True)
class Row:
    """One compared quantity.

    Attributes:
        case: what was run.
        quantity: what was compared.
        error: the largest difference, relative to the reference's largest value, or to 1 if that is larger.
        bound: what the error may be.
        control: it must be beyond the bound, or the comparison sees nothing.
    """

    case: str
    quantity: str
    error: float
    bound: float
    control: bool = False

    @property
    def passed(self) -> bool:
        """Whether the error is on the right side of the bound. NaN never is."""
        return self.error > self.bound if self.control else self.error <= self.bound

    def part_of_bound(self) -> float:
        """Return error / bound; NaN, which max() would pass over, as infinity."""
        return math.inf if math.isnan(self.error) else self.error / self.bound

    def required(self) -> str:
        """Return the bound as the table shows it."""
        return f"{'> ' if self.control else '<= '}{self.bound:.0e}"

    def verdict(self) -> str:
        """Say what is wrong."""
        if self.control:
            return f"{self.case}: {self.quantity} is within the bound, so this comparison sees nothing"
        return f"{self.case}: error of {self.quantity} is {self.error:.1e}, beyond {self.bound:.0e}"


def error_of(ours: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Return the largest difference relative to `scale`: the largest expected value, or 1 if that is larger."""
    if ours.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double().cpu()
    if scale is None:
        scale = max(1.0, expected.abs().max().item())
    return (ours.detach().double().cpu() - expected).abs().max().item() / scale


def over_ranks(rows: Sequence[Row], comm: Communicator) -> list[Row]:
    """Give every row the largest error of all ranks. One all-reduce; the rows are the same on every rank."""
    everybodys = gather(comm, torch.tensor([row.error for row in rows], dtype=torch.float64, device="cpu"))
    worst = everybodys.max(0).values.tolist()  # a NaN wins
    return [replace(row, error=error) for row, error in zip(rows, worst, strict=True)]
