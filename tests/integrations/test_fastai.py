"""fastai: `distrib_ctx(sync_bn=True)`."""

from __future__ import annotations

import functools

import pytest
import torch
from integrations.comparison import (
    EQUAL,
    STEPS,
    batch,
    largest_difference,
    made,
    mine,
    small_network,
    torchrun_variables,
    trained_on_whole_batches,
)
from torch import nn
from torch.utils.data import TensorDataset

import syncbn

pytest.importorskip("fastai")
from accelerate.state import AcceleratorState
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD


def _loaders(size: int) -> DataLoaders:
    """DistributedDL gives the first rank the first part of all images, and so on: they are put in that order."""
    parts = [[whole[mine(rank, EQUAL)] for whole in batch(step)] for rank in range(size) for step in range(STEPS)]
    dataset = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return DataLoaders(*(DataLoader(dataset, bs=EQUAL[0], num_workers=0) for _ in ("training", "validation")))


def _train(rank: int, size: int) -> float:
    with torchrun_variables(rank, size), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedDL, "_broadcast", lambda self, indices, rank: indices)  # it goes by way of a GPU
        model = made(small_network)
        sgd = functools.partial(SGD, mom=0.9)
        learn = Learner(_loaders(size), model, loss_func=nn.CrossEntropyLoss(), opt_func=sgd, lr=0.01)
        learn.remove_cbs([ProgressCallback, Recorder])  # which averages losses in float32
        with syncbn.replace_torch_conversion(), learn.distrib_ctx(sync_bn=True, cpu=True):
            learn.fit(1)
        AcceleratorState._reset_state(reset_partial_state=True)
    return largest_difference(model, trained_on_whole_batches(small_network))


def test_distrib_ctx(agrees) -> None:
    agrees(_train)
