"""transformers: its Trainer, with an image model from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integrations.comparison import (
    EQUAL,
    STEPS,
    batch,
    largest_difference,
    made,
    sgd,
    torchrun_variables,
    trained_on_whole_batches,
)
from torch import Tensor, nn

import syncbn

transformers = pytest.importorskip("transformers")
from accelerate.state import AcceleratorState  # noqa: E402
from transformers import (  # noqa: E402
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}


def regnet() -> nn.Module:
    return RegNetForImageClassification(RegNetConfig(groups_width=8, **SMALL))


def resnet() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", **SMALL))


class Logits(nn.Module):
    def __init__(self, factory: Any) -> None:
        super().__init__()
        self.net = factory()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits


def _train(rank: int, size: int, factory: Any, folder: Path, default: bool = False) -> float:
    model = made(factory)
    samples = [{"pixel_values": x, "labels": y} for step in range(STEPS) for x, y in zip(*batch(step), strict=True)]
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": EQUAL[rank],
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "max_grad_norm": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    with torchrun_variables(rank, size):
        arguments = TrainingArguments(average_tokens_across_devices=False, **options)
        if default:
            arguments = TrainingArguments(**options)
        model = syncbn.convert_sync_batchnorm(model)
        optimizer = sgd(model)
        constant = transformers.get_constant_schedule(optimizer)
        Trainer(model=model, args=arguments, train_dataset=samples, optimizers=(optimizer, constant)).train()
        AcceleratorState._reset_state(reset_partial_state=True)
    return largest_difference(model, trained_on_whole_batches(lambda: Logits(factory)))


@pytest.mark.parametrize("factory", [resnet, regnet])
def test_trainer(agrees, factory: Any, tmp_path: Path) -> None:
    agrees(_train, factory, tmp_path)


def test_the_default_multiplies_gradients(gloo, tmp_path: Path) -> None:
    """The model takes the number of items among its **kwargs, and does not use it."""
    assert max(gloo(2, _train, resnet, tmp_path, True, seconds=120)) > 1e-3
