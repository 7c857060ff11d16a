"""DeepSpeed's engine on CPUs, in float32: it averages gradients, and keeps ZeRO's weights, in no wider type."""

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
    torchrun_variables,
    trained_on_whole_batches,
    with_local_statistics,
)
from torch import nn

import syncbn

deepspeed = pytest.importorskip("deepspeed")


def _build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def _train(rank: int, size: int, stage: int) -> float:
    """Return the difference to float64."""
    with torchrun_variables(rank, size), pytest.MonkeyPatch.context() as patch:
        # Or it compiles an all-reduce over shared memory of its own first, which takes a minute.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        model = made(_build).float()
        model = syncbn.convert_sync_batchnorm(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=sgd(model),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        for step in range(STEPS):
            images, labels = (whole[mine(rank, EQUAL)] for whole in batch(step))
            engine.backward(nn.functional.cross_entropy(engine(images.float()), labels))
            engine.step()
    return largest_difference(model, trained_on_whole_batches(_build))


@pytest.mark.parametrize("stage", [0, 1])
def test_zero_stage(gloo, stage: int) -> None:
    assert max(gloo(2, _train, stage, seconds=120)) < 2e-6
    assert max(gloo(2, with_local_statistics, _train, stage, seconds=120)) > 1e-3
