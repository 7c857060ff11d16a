"""Ray Train: a TorchTrainer with two workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integrations.comparison import (
    EQUAL,
    STEPS,
    batch,
    largest_difference,
    made,
    mine,
    sgd,
    small_network,
    trained_on_whole_batches,
)
from torch import nn

import syncbn

pytest.importorskip("ray")
import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

ROOT = Path(__file__).parents[2]


def train(convert: bool) -> float:
    rank = ray.train.get_context().get_world_rank()
    model = made(small_network)
    if convert:
        model = syncbn.convert_sync_batchnorm(model)
    model = prepare_model(model)
    optimizer = sgd(model)
    for step in range(STEPS):
        images, labels = (whole[mine(rank, EQUAL)] for whole in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return largest_difference(model, trained_on_whole_batches(small_network))


def train_twice(config: dict[str, Any]) -> None:
    """Write down, as a worker, how far synchronised and local training are from the whole batch."""
    context = ray.train.get_context()
    differences = [train(convert=True), train(convert=False)]
    Path(config["folder"], str(context.get_world_rank())).write_text(json.dumps(differences))


@pytest.mark.timeout(600)  # its own processes start slowly where others use the machine
def test_torch_trainer(note: Callable[[float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    workers_environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": workers_environment})
    try:
        TorchTrainer(
            train_twice,
            train_loop_config={"folder": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "runs")),
        ).fit()
    finally:
        ray.shutdown()
    synchronised, local = zip(*(json.loads((tmp_path / rank).read_text()) for rank in "01"), strict=True)
    note(max(synchronised))
    assert max(synchronised) <= 1e-9
    assert max(local) > 1e-6
