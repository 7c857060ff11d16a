"""Ray Train: a TorchTrainer with two workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.comparison import largest_difference, made
from integrations.training import batches, small_network, train_whole
from torch import nn

import syncbn

ray = pytest.importorskip("ray")
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model


def train(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    context = ray.train.get_context()
    model = made(small_network)
    model = syncbn.convert_sync_batchnorm(model)
    model = prepare_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for images, targets in batches(slice(context.get_world_rank(), None, context.get_world_size())):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(images), targets).backward()
        optimizer.step()
    ray.train.report({"difference": largest_difference(model, train_whole())})


def test_torch_trainer(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    paths = f"{root}:{root / 'tests'}"
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        trainer = TorchTrainer(
            train, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path=str(tmp_path))
        )
        found = trainer.fit().metrics["difference"]
    finally:
        ray.shutdown()
    assert found <= 1e-9
