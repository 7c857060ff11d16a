"""mmengine: its Runner, given a converted model, and with a wrapper that a configuration names."""

from __future__ import annotations

from typing import Any

import pytest
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
from torch import Tensor, nn
from torch.utils.data import DataLoader

import syncbn

pytest.importorskip("mmengine")
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, images: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        scores = self.network(images)
        return {"loss": nn.functional.cross_entropy(scores, labels)} if mode == "loss" else scores


@MODEL_WRAPPERS.register_module()
class SynchronisedDDP(MMDistributedDataParallel):
    def __init__(self, module, **options):
        super().__init__(syncbn.convert_sync_batchnorm(module), **options)


def run(rank: int, size: int, folder: str, model: nn.Module, cfg: dict[str, Any]) -> float:
    parts = [[whole[mine(rank, EQUAL)] for whole in batch(step)] for step in range(STEPS)]
    with torchrun_variables(rank, size):
        runner = Runner(
            model=model,
            work_dir=folder,
            experiment_name=f"{folder} {rank} {cfg}",
            train_dataloader=DataLoader(parts, batch_size=None),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            default_hooks={"checkpoint": None, "sampler_seed": None},
            launcher="pytorch",
            cfg=cfg,
            log_level="ERROR",
        )
        runner.train()
    return largest_difference(runner.model, trained_on_whole_batches(Classifier))


def _train_converted(rank: int, size: int, folder: str) -> float:
    model = made(Classifier)
    model = syncbn.convert_sync_batchnorm(model)
    on_cpus = {"type": "MMDistributedDataParallel", "device_ids": None}  # else it names a GPU
    return run(rank, size, folder, model, {"model_wrapper_cfg": on_cpus})


def test_runner_with_converted_model(agrees, tmp_path) -> None:
    agrees(_train_converted, str(tmp_path))


def _train_in_wrapper(rank: int, size: int, folder: str, options: dict[str, str]) -> float:
    model_wrapper_cfg = {"type": "SynchronisedDDP"}
    model_wrapper_cfg["device_ids"] = None
    return run(rank, size, folder, made(Classifier), {"model_wrapper_cfg": model_wrapper_cfg, **options})


def test_runner_with_wrapper(agrees, tmp_path) -> None:
    agrees(_train_in_wrapper, str(tmp_path), {})


def test_runner_with_wrapper_and_sync_bn(agrees, tmp_path) -> None:
    """mmengine has made them nn.SyncBatchNorm then, which its DDP refuses on a CPU."""
    agrees(_train_in_wrapper, str(tmp_path), {"sync_bn": "torch"}, control=False)
