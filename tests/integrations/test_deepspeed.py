"""DeepSpeed on CPUs."""

from __future__ import annotations

import pytest
import torch
from integrations.comparison import largest_difference, made
from integrations.training import batches, small_network, train_whole
from torch import nn

import syncbn

deepspeed = pytest.importorskip("deepspeed")


def _train(rank: int, size: int, stage: int) -> float:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}.items():
            patch.setenv(name, str(value))
        model = made(small_network)
        model = syncbn.convert_sync_batchnorm(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
            config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}},
        )
        for images, targets in batches(slice(rank, None, size)):
            engine.backward(nn.functional.mse_loss(engine(images), targets))
            engine.step()
    return largest_difference(model, train_whole())


@pytest.mark.parametrize("stage", [0, 1])
def test_engine(agrees, stage: int) -> None:
    agrees(_train, stage)
