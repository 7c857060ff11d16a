"""The training of models that come without a trainer: this rank's part in DDP, and the whole batch beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from integrations.comparison import largest_difference, sgd
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
    trained = [sgd(net) for net in (model, whole)]
    for parts in steps:
        for optimizer in trained:
            optimizer.zero_grad()
        syncbn.global_mean(*loss(parallel, parts[rank])).backward()
        total, count = loss(whole, join(parts))
        (total / count).backward()
        for optimizer in trained:
            optimizer.step()
    return largest_difference(model, whole)
