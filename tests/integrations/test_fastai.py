"""fastai: `distrib_ctx(sync_bn=True)`."""

from __future__ import annotations

import pytest
import torch
from integrations.comparison import largest_difference, made
from integrations.training import batches, small_network, train_whole
from torch import nn
from torch.utils.data import TensorDataset

import syncbn

pytest.importorskip("fastai")
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD


def loaders(size: int) -> DataLoaders:
    """DistributedDL gives the first rank the first part of all images, and so on: order them for that."""
    parts = [batch for rank in range(size) for batch in batches(slice(rank, None, size))]
    dataset = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return DataLoaders(*(DataLoader(dataset, bs=len(parts[0][0]), num_workers=0) for _ in range(2)))


def _train(rank: int, size: int) -> float:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}.items():
            patch.setenv(name, str(value))  # the launcher's
        patch.setattr(DistributedDL, "_broadcast", lambda self, t, rank: t)  # it wants a GPU
        model = made(small_network)
        learn = Learner(loaders(size), model, loss_func=nn.MSELoss(), opt_func=SGD, lr=0.01)
        learn.remove_cb(Recorder)  # it averages losses in float32
        with (
            learn.no_bar(),
            learn.no_logging(),
            syncbn.replace_torch_conversion(),
            learn.distrib_ctx(sync_bn=True, cpu=True),
        ):
            learn.fit(1)
    return largest_difference(model, train_whole(momentum=0))


def test_distrib_ctx(agrees) -> None:
    agrees(_train, control=False)
