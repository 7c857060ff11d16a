"""detectron2, which is on no package index: the two ways in which its `get_norm` makes a layer, by a stand-in.

`get_norm(norm, channels)` looks a name up or calls `norm(channels)`; a configuration that is Python holds either.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.comparison import made, random_images
from integrations.training import train_both
from torch import Tensor, nn

import syncbn

NAMES = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


def get_norm(norm: Any, channels: int) -> nn.Module:
    return NAMES.get(norm, norm)(channels)  # type: ignore[no-any-return]


def build(norm: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), get_norm(norm, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), get_norm(norm, 4))


class Trainer:
    """As detectron2's DefaultTrainer, which makes the model by this method."""

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        return build(cfg)


class SynchronisedTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg):
        return syncbn.convert_sync_batchnorm(super().build_model(cfg))


def loss(net: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    return net(images).square().mul(torch.linspace(0, 1, 8, dtype=torch.float64)).sum(), len(images)


def _train(rank: int, size: int, way: str) -> float:
    if way == "callable":
        model = made(lambda: build(norm=syncbn.SyncBatchNorm))
    else:
        model = made(lambda: SynchronisedTrainer.build_model(way))
    steps = [(random_images(2 * step, 1, 3, 12, 12), random_images(2 * step + 1, 3, 3, 12, 12)) for step in range(3)]
    return train_both(rank, model, made(lambda: build("BN")), steps, loss, torch.cat)


@pytest.mark.parametrize("way", ["callable", *NAMES])
def test_get_norm(gloo, way: str) -> None:
    assert max(gloo(2, _train, way, seconds=120)) <= 1e-9
