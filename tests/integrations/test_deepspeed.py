"""DeepSpeed's engine on CPUs, in float32: it averages gradients, and keeps ZeRO's weights, in no wider type."""

from __future__ import annotations

import pytest
import torch
from integrations.comparison import largest_difference, made, with_local_statistics
from integrations.training import batches, small_network, train_whole
from torch import nn

import syncbn

deepspeed = pytest.importorskip("deepspeed")


def _train(rank: int, size: int, stage: int) -> float:
    """Return the difference to float64."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}.items():
            patch.setenv(name, str(value))  # the launcher's
        # Or it compiles an all-reduce over shared memory of its own first, which takes a minute.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        model = made(small_network).float()
        model = syncbn.convert_sync_batchnorm(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        for images, targets in batches(slice(rank, None, size)):
            engine.backward(nn.functional.mse_loss(engine(images.float()), targets.float()))
            engine.step()
    return largest_difference(model, train_whole())


@pytest.mark.parametrize("stage", [0, 1])
def test_zero_stage(gloo, stage: int) -> None:
    assert max(gloo(2, _train, stage, seconds=120)) < 2e-6
    assert max(gloo(2, with_local_statistics, _train, stage, seconds=120)) > 1e-3
