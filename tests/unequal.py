"""Training on different numbers of batches of different sizes, and one process that has all samples of each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FEATURES = 4


def made() -> nn.Module:
    """Return the same model each time, also on threads."""
    linears = nn.Linear(FEATURES, 5), nn.Linear(5, 3), nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(0)
    for p in (p for linear in linears for p in linear.parameters()):
        nn.init.normal_(p, generator=generator)
    norms = nn.BatchNorm1d(5), nn.BatchNorm1d(3, momentum=None)
    return nn.Sequential(linears[0], norms[0], nn.ReLU(), linears[1], norms[1], linears[2]).double()


def momentum_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(epoch: int, step: int, rank: int) -> Tensor:
    """Return 2 to 4 samples."""
    generator = torch.Generator().manual_seed(1 + 10_000 * epoch + 100 * step + rank)
    samples = 2 + (step + rank) % 3
    return torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64) * (1 + rank) + step


def loss_of(y: Tensor) -> Tensor:
    return (y - 0.5).square().sum()


def reference(epochs: Sequence[Sequence[int]]) -> nn.Module:
    """Train one process on the samples of each step; an epoch is the number of batches of each rank."""
    model = made()
    optimizer = momentum_of(model)
    for epoch, counts in enumerate(epochs):
        for step in range(max(counts)):
            xs = [batch(epoch, step, rank) for rank, count in enumerate(counts) if step < count]
            optimizer.zero_grad()
            y = model(torch.cat(xs))
            (loss_of(y) / len(y)).backward()
            optimizer.step()
    return model


def largest_difference(model: nn.Module, expected: nn.Module) -> float:
    """Of parameters, running statistics and num_batches_tracked."""
    pairs = zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)
