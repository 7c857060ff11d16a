"""lightly: the heads and losses of SimCLR, Barlow Twins and BYOL, over the batch of all ranks."""

from __future__ import annotations

import functools

import pytest
from integrations.comparison import made, random_images
from integrations.training import train_both
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

pytest.importorskip("lightly")
import lightly.loss.barlow_twins_loss
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import heads

LOCAL = lightly.loss.barlow_twins_loss._normalize
HEADS = {
    "SimCLR": lambda: (heads.SimCLRProjectionHead(32, 32, 8), nn.Identity()),
    "Barlow Twins": lambda: (heads.BarlowTwinsProjectionHead(32, 32, 8), nn.Identity()),
    "BYOL": lambda: (heads.BYOLProjectionHead(32, 32, 8), heads.BYOLPredictionHead(8, 16, 8)),
}


class TwoViews(nn.Module):
    """A small backbone with projection and prediction, run on one view of the images after the other."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.projection, self.prediction = HEADS[name]()

    def forward(self, *views: Tensor) -> list[tuple[Tensor, Tensor]]:
        projections = [self.projection(self.backbone(view)) for view in views]
        return [(z, self.prediction(z)) for z in projections]


def loss(name: str, net: nn.Module, views: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    (z_a, p_a), (z_b, p_b) = net(*views)
    gathers = isinstance(net, DistributedDataParallel)
    if name == "SimCLR":
        return NTXentLoss(gather_distributed=gathers)(p_a, p_b), 1
    if name == "BYOL":
        similarity = NegativeCosineSimilarity()
        return similarity(p_a, z_b.detach()) + similarity(p_b, z_a.detach()), 1
    if gathers:
        lightly.loss.barlow_twins_loss._normalize = syncbn.functional.sync_batch_norm
    else:
        lightly.loss.barlow_twins_loss._normalize = LOCAL
    return BarlowTwinsLoss(gather_distributed=gathers)(p_a, p_b), 1


def views(seed: int) -> tuple[Tensor, Tensor]:
    return random_images(2 * seed, 3, 3, 12, 12), random_images(2 * seed + 1, 3, 3, 12, 12)


def _train(rank: int, size: int, name: str) -> float:
    model = made(functools.partial(TwoViews, name))
    model = syncbn.convert_sync_batchnorm(model)
    steps = [[views(size * step + part) for part in range(size)] for step in range(3)]
    return train_both(rank, model, made(functools.partial(TwoViews, name)), steps, functools.partial(loss, name))


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_loss(agrees, name: str) -> None:
    agrees(_train, name)


def _train_with_the_loss_as_it_is(rank: int, size: int) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syncbn.functional, "sync_batch_norm", LOCAL)
        return _train(rank, size, "Barlow Twins")


def test_barlow_twins_loss_itself_normalises_with_local_statistics(gloo) -> None:
    assert min(gloo(2, _train_with_the_loss_as_it_is, seconds=120)) > 1e-3
