"""pytorch-ignite: `auto_model(sync_bn=True)` in one of its trainers."""

from __future__ import annotations

import pytest
import torch
from integrations.comparison import largest_difference, made
from integrations.training import batches, small_network, train_whole
from torch import nn

import syncbn

pytest.importorskip("ignite")
import ignite.distributed as idist
from ignite.engine import create_supervised_trainer


def _train(rank: int, size: int) -> float:
    model = made(small_network)
    with syncbn.replace_torch_conversion():
        model = idist.auto_model(model, sync_bn=True)
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    trainer = create_supervised_trainer(model, optimizer, nn.MSELoss(), device=idist.device())
    trainer.run(batches(slice(rank, None, size)))
    return largest_difference(model, train_whole())


def test_auto_model(agrees) -> None:
    agrees(_train, control=False)


def _without_replacement(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        idist.auto_model(small_network(), sync_bn=True)


def test_on_a_cpu_torchs_own_layers_are_refused(gloo) -> None:
    gloo(2, _without_replacement, seconds=120)
