"""mmcv: `norm_cfg` names our layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.comparison import made, random_images
from integrations.training import train_both
from torch import Tensor, nn

import syncbn

pytest.importorskip("mmcv")
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.registry import MODELS

MODELS.register_module("syncbn", module=syncbn.SyncBatchNorm)
norm_cfg = {"type": "syncbn"}


def build(norm_cfg: dict[str, Any]) -> nn.Module:
    return nn.Sequential(*(ConvModule(inner, 4, 3, norm_cfg=norm_cfg) for inner in (3, 4)))


def loss(net: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    return net(images).mul(torch.linspace(0, 1, 8, dtype=torch.float64)).square().sum(), len(images)


def steps() -> list[tuple[Tensor, Tensor]]:
    return [(random_images(2 * step, 1, 3, 12, 12), random_images(2 * step + 1, 3, 3, 12, 12)) for step in range(3)]


def _train(rank: int, size: int) -> float:
    model, whole = made(lambda: build(norm_cfg)), made(lambda: build({"type": "BN"}))
    return train_both(rank, model, whole, steps(), loss, torch.cat)


def test_norm_cfg(agrees) -> None:
    agrees(_train, control=False)


def _train_converted(rank: int, size: int, name: str) -> float:
    model, whole = made(lambda: build({"type": name})), made(lambda: build({"type": "BN"}))
    model = syncbn.convert_sync_batchnorm(model)
    return train_both(rank, model, whole, steps(), loss, torch.cat)


def test_names_of_mmcv(agrees) -> None:
    agrees(_train_converted, "BN")


def test_its_synchronised_layer(agrees) -> None:
    """On a CPU it would be refused by DDP."""
    agrees(_train_converted, "SyncBN", control=False)


def test_name_and_options() -> None:
    name, layer = build_norm_layer({**norm_cfg, "momentum": 0.01, "requires_grad": False}, 4, postfix=1)
    assert name == "bn1"
    assert (layer.momentum, layer.weight.requires_grad) == (0.01, False)
