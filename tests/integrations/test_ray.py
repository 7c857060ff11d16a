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

pytest.importorskip("ray")
import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

ROOT = Path(__file__).parents[2]


def train(convert: bool) -> float:
    context = ray.train.get_context()
    model = made(small_network)
    if convert:
        model = syncbn.convert_sync_batchnorm(model)
    model = prepare_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for images, targets in batches(slice(context.get_world_rank(), None, context.get_world_size())):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(images), targets).backward()
        optimizer.step()
    return largest_difference(model, train_whole())


def train_twice(config: dict[str, Any]) -> None:
    """What a worker does."""
    assert ray.train.get_context().get_world_size() == 2
    assert train(convert=True) <= 1e-9
    assert train(convert=False) > 1e-6


def test_torch_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    workers_environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": workers_environment})
    try:
        TorchTrainer(
            train_twice,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path)),
        ).fit()
    finally:
        ray.shutdown()
