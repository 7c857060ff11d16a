"""timm: BatchNormAct2d keeps its activation."""

from __future__ import annotations

import pytest
from integrations.comparison import STEPS, UNEQUAL, batch, largest_difference, made, mine, sgd, trained_on_whole_batches
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

timm = pytest.importorskip("timm")


def _train(rank: int, size: int, name: str) -> float:
    def build() -> nn.Module:
        return timm.create_model(name, num_classes=3)

    model = made(build)
    model = syncbn.convert_sync_batchnorm(model)
    parallel = DistributedDataParallel(model)
    optimizer = sgd(model)
    for step in range(STEPS):
        images, labels = (whole[mine(rank)] for whole in batch(step))
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(parallel(images), labels, reduction="sum")
        syncbn.global_mean(total, UNEQUAL[rank]).backward()
        optimizer.step()
    return largest_difference(model, trained_on_whole_batches(build))


@pytest.mark.parametrize("name", ["regnetx_002", "mobilenetv3_small_050", "efficientnet_b0"])
def test_unequal_images(agrees, name: str) -> None:
    agrees(_train, name)
