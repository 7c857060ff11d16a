"""Lightning: its trainer, by a LayerSync plugin and by its own flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.comparison import (
    STEPS,
    batch,
    largest_difference,
    made,
    mine,
    sgd,
    small_network,
    torchrun_variables,
    trained_on_whole_batches,
)
from torch import Tensor, nn

import syncbn

lightning = pytest.importorskip("lightning")
from lightning.pytorch.plugins import LayerSync  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402


class SyncBatchNormPlugin(LayerSync):
    def apply(self, model):
        return syncbn.convert_sync_batchnorm(model)

    def revert(self, model):
        return syncbn.revert_sync_batchnorm(model)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_network()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, part: tuple[Tensor, Tensor], step: int) -> Tensor:
        images, labels = part
        total = nn.functional.cross_entropy(self(images), labels, reduction="sum")
        return syncbn.global_mean(total, len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


def _train(rank: int, size: int, folder: Path, **options: Any) -> float:
    model = made(Classifier)
    parts = [tuple(whole[mine(rank)] for whole in batch(step)) for step in range(STEPS)]
    loader = torch.utils.data.DataLoader(parts, batch_size=None)
    with torchrun_variables(rank, size):
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=size,
            use_distributed_sampler=False,  # the parts are this rank's
            strategy="ddp",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **options,
        )
        trainer.fit(model, loader)
    reverted = not any(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules())
    assert reverted or "sync_batchnorm" in options
    return largest_difference(model, trained_on_whole_batches(Classifier))


def _with_flag(rank: int, size: int, folder: Path) -> float:
    with syncbn.replace_torch_conversion():
        return _train(rank, size, folder, sync_batchnorm=True, plugins=[LightningEnvironment()])


def _with_plugin(rank: int, size: int, folder: Path) -> float:
    plugins = [SyncBatchNormPlugin(), LightningEnvironment()]
    return _train(rank, size, folder, plugins=plugins)


@pytest.mark.parametrize("job", [_with_flag, _with_plugin])
def test_unequal_images(agrees, job: Any, tmp_path: Path) -> None:
    agrees(job, tmp_path)
