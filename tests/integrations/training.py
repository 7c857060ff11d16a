"""The training of models that come without a trainer: this rank's part in DDP, and the whole batch beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from integrations.comparison import largest_difference, made, random_images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

Loss = Callable[[nn.Module, Any], tuple[Tensor, float]]


def join_tensors(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def train_both(
    rank: int,
    model: nn.Module,
    whole: nn.Module,
    steps: Iterable[Sequence[Any]],
    loss: Loss,
    join: Callable[[Sequence[Any]], Any] = join_tensors,
) -> float:
    """Train `model` on this rank's parts and `whole` on all parts at once; return how far they are apart then.

    Args:
        rank: of this process.
        model: synchronised.
        whole: the same model, which is not.
        steps: for each step the parts of the ranks.
        loss: returns the sum of the terms of a part, and how many they are.
        join: makes one part of all.
    """
    parallel = DistributedDataParallel(model)
    trained = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (model, whole)]
    for parts in steps:
        for optimizer in trained:
            optimizer.zero_grad()
        syncbn.global_mean(*loss(parallel, parts[rank])).backward()
        total, count = loss(whole, join(parts))
        (total / count).backward()
        for optimizer in trained:
            optimizer.step()
    return largest_difference(model, whole)


# ---- for trainers of other libraries, which get a network from here


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )  # fmt: skip


def batches(part: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
    """Return three steps' images and targets for the mean squared error; `part` of each."""
    images = [random_images(step, 4, 2, 6, 6) for step in range(3)]
    return [(x[part], x[part].flatten(1)[:, :3].cos()) for x in images]


def train_whole(lr: float = 0.01, momentum: float = 0.9) -> nn.Module:
    """Train the small network on the whole batches by one process."""
    model: nn.Module = made(small_network)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for images, targets in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(images), targets).backward()
        optimizer.step()
    return model
