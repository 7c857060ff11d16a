"""MONAI: 3-D networks whose norm is "batch"."""

from __future__ import annotations

import pytest
from integrations.comparison import made, random_images
from integrations.training import train_both
from torch import Tensor, nn

import syncbn

pytest.importorskip("monai")
from monai.losses import DiceLoss
from monai.networks import nets

COMMON = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
MODELS = {
    "UNet": {**COMMON, "channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 1, "norm": "batch"},
    "SegResNet": {**COMMON, "init_filters": 4, "blocks_down": (1, 1), "blocks_up": (1,), "norm": "batch"},
    "DynUNet": {
        **COMMON, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 16], "norm_name": "batch",
    },
}  # fmt: skip


def batch(step: int, volumes: int) -> tuple[Tensor, Tensor]:
    x = random_images(step, volumes, 1, 16, 16, 16)
    return x, (x > 0.5).double().expand(-1, 2, -1, -1, -1)


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Dice of every volume and class."""
    volumes, masks = batch
    return DiceLoss(sigmoid=True, reduction="sum")(net(volumes), masks), len(volumes) * masks.shape[1]


def _train(rank: int, size: int, name: str) -> float:
    def build() -> nn.Module:
        return getattr(nets, name)(**MODELS[name])  # type: ignore[no-any-return]

    model = made(build)
    model = syncbn.convert_sync_batchnorm(model)
    steps = [[batch(2 * step, 1), batch(2 * step + 1, 2)] for step in range(3)]
    return train_both(rank, model, made(build), steps, loss)


@pytest.mark.parametrize("name", MODELS)
def test_unequal_volumes(agrees, name: str) -> None:
    agrees(_train, name)
