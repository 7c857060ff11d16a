"""segmentation-models-pytorch: its decoders, on encoders of torchvision's kind and of timm."""

from __future__ import annotations

import pytest
from integrations.comparison import made, random_images
from integrations.training import train_both
from torch import Tensor, nn

import syncbn

smp = pytest.importorskip("segmentation_models_pytorch")

MODELS = {"Unet": {}, "FPN": {"decoder_dropout": 0}, "DeepLabV3Plus": {"decoder_aspp_dropout": 0}}


def batch(step: int, images: int) -> tuple[Tensor, Tensor]:
    """Not smaller: of 32 pixels the last stage leaves one, and the order of three images alone makes 1e-7."""
    x = random_images(step, images, 3, 64, 64)
    return x, (x[:, :2] > 0.5).double()


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, masks = batch
    return nn.functional.binary_cross_entropy_with_logits(net(images), masks, reduction="sum"), masks.numel()


def _train(rank: int, size: int, name: str, encoder: str) -> float:
    def build() -> nn.Module:
        return getattr(smp, name)(encoder, encoder_weights=None, classes=2, **MODELS[name])  # type: ignore[no-any-return]

    model = made(build)
    model = syncbn.convert_sync_batchnorm(model)
    steps = [[batch(2 * step, 1), batch(2 * step + 1, 2)] for step in range(3)]
    return train_both(rank, model, made(build), steps, loss)


@pytest.mark.parametrize("name", MODELS)
def test_unequal_images(agrees, name: str) -> None:
    # The pooling branch of DeepLabV3+ has one value per channel and image: alone, nn.BatchNorm refuses it.
    agrees(_train, name, "resnet18", control=name != "DeepLabV3Plus")


def test_encoder_of_timm(agrees) -> None:
    agrees(_train, "Unet", "tu-mobilenetv3_small_050")
