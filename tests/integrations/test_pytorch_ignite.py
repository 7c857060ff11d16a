"""pytorch-ignite: `auto_model(sync_bn=True)` in one of its trainers."""

from __future__ import annotations

import pytest
from integrations.comparison import (
    EQUAL,
    STEPS,
    batch,
    largest_difference,
    made,
    mine,
    sgd,
    small_network,
    trained_on_whole_batches,
)
from torch import nn

import syncbn

pytest.importorskip("ignite")
import ignite.distributed as idist
from ignite.engine import create_supervised_trainer


def _train(rank: int, size: int) -> float:
    model = made(small_network)
    with syncbn.replace_torch_conversion():
        model = idist.auto_model(model, sync_bn=True)
    optimizer = idist.auto_optim(sgd(model))
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss(), device=idist.device())
    trainer.run([[whole[mine(rank, EQUAL)] for whole in batch(step)] for step in range(STEPS)])
    return largest_difference(model, trained_on_whole_batches(small_network))


def test_auto_model(agrees) -> None:
    agrees(_train)


def _without_replacement(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        idist.auto_model(small_network(), sync_bn=True)


def test_on_a_cpu_torchs_own_layers_are_refused(gloo) -> None:
    gloo(2, _without_replacement, seconds=120)
