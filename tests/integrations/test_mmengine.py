"""mmengine: its Runner, with and without `sync_bn`."""

from __future__ import annotations

import pytest
from integrations.comparison import largest_difference, made
from integrations.training import batches, small_network, train_whole
from torch import Tensor, nn
from torch.utils.data import DataLoader

import syncbn

pytest.importorskip("mmengine")
import mmengine.runner.runner
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Regression(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, images: Tensor, targets: Tensor, mode: str) -> dict[str, Tensor]:
        assert mode == "loss"
        return {"loss": nn.functional.mse_loss(self.network(images), targets)}


def run(rank: int, size: int, folder: str, model: nn.Module, **options: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        runner = Runner(
            model=model,
            work_dir=folder,
            experiment_name=f"{folder} {rank} {options}",
            train_dataloader=DataLoader(batches(slice(rank, None, size)), batch_size=None),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            default_hooks={"checkpoint": None, "sampler_seed": None},
            launcher="pytorch",
            cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}, **options},
            log_level="ERROR",
        )
        runner.train()
    return largest_difference(runner.model, train_whole())


def _train(rank: int, size: int, folder: str) -> float:
    model = made(Regression)
    model = syncbn.convert_sync_batchnorm(model)
    return run(rank, size, folder, model)


def test_runner(agrees, tmp_path) -> None:
    agrees(_train, str(tmp_path))


def _train_with_sync_bn(rank: int, size: int, folder: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.runner.runner, "convert_sync_batchnorm", lambda model, _: syncbn.convert_sync_batchnorm(model))
        return run(rank, size, folder, made(Regression), sync_bn="torch")


def test_its_flag_where_its_conversion_is_replaced(agrees, tmp_path) -> None:
    agrees(_train_with_sync_bn, str(tmp_path))
