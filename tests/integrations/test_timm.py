"""timm: BatchNormAct2d keeps its activation."""

from __future__ import annotations

import pytest
import torch
from integrations.comparison import largest_difference, made, random_images
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

timm = pytest.importorskip("timm")


def _train(rank: int, size: int, name: str) -> float:
    def build() -> nn.Module:
        return timm.create_model(name, num_classes=3)

    model = made(build)
    model = syncbn.convert_sync_batchnorm(model)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    whole = made(build)
    trained = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (model, whole)]
    counts = [1, 3]  # images of each rank
    for step in range(3):
        images, labels = random_images(step, sum(counts), 3, 64, 64), torch.tensor([0, 1, 2, 1])
        for optimizer in trained:
            optimizer.zero_grad()
        mine = torch.arange(sum(counts)).split(counts)[rank]
        total = nn.functional.cross_entropy(parallel(images[mine]), labels[mine], reduction="sum")
        syncbn.global_mean(total, counts[rank]).backward()
        nn.functional.cross_entropy(whole(images), labels).backward()
        for optimizer in trained:
            optimizer.step()
    return largest_difference(model, whole)


@pytest.mark.parametrize("name", ["regnetx_002", "mobilenetv3_small_050", "efficientnet_b0"])
def test_unequal_images(agrees, name: str) -> None:
    agrees(_train, name)
