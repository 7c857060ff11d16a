"""accelerate: a loop of one's own, prepared."""

from __future__ import annotations

import pytest
from integrations.comparison import (
    EQUAL,
    STEPS,
    batch,
    largest_difference,
    made,
    sgd,
    small_network,
    torchrun_variables,
    trained_on_whole_batches,
)
from torch import nn
from torch.utils.data import DataLoader

import syncbn

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402


def _train(rank: int, size: int) -> float:
    model = made(small_network)
    optimizer = sgd(model)
    samples = [pair for step in range(STEPS) for pair in zip(*batch(step), strict=True)]
    loader = DataLoader(samples, batch_size=EQUAL[rank])
    with torchrun_variables(rank, size):
        accelerator = accelerate.Accelerator(cpu=True)
        model = syncbn.convert_sync_batchnorm(model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    return largest_difference(model, trained_on_whole_batches(small_network))


def test_a_loop(agrees) -> None:
    agrees(_train)
