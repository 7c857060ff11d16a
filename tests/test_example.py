"""The digit detector: the same training under every launcher, resumed exactly, killed without harm."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_job, start_job

DETECTOR = "examples/detect_digits.py"
QUICK = ("--dtype", "float64", "--test-canvases", "2", "--eval-every", "100")

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(240)]


def metrics(folder: Path) -> dict[str, object]:
    return json.loads((folder / "metrics.json").read_text())


def alone(folder: Path, *options: str, images: int = 4, norm: str = "batch") -> dict[str, object]:
    command = [sys.executable, DETECTOR, "--images-per-process", str(images), "--norm", norm, "--output", str(folder)]
    job = run_job([*command, *QUICK, *options], seconds=100)
    assert job.returncode == 0, job.stdout
    return metrics(folder)


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """One process, the whole batch of 4, nn.BatchNorm2d."""
    return alone(tmp_path_factory.mktemp("whole"), "--steps", "10")


def largest_difference(ours: dict[str, object], theirs: dict[str, object]) -> float:
    a, b = (torch.tensor(run["losses"], dtype=torch.float64) for run in (ours, theirs))
    assert len(a) == len(b) == 10
    return ((a - b).abs() / b.abs()).max().item()


def test_two_processes_train_like_the_whole_batch(launch, tmp_path: Path, whole_batch: dict[str, object]) -> None:
    options = ("--images-per-process", "2", "--norm", "sync", "--steps", "10", "--output", str(tmp_path))
    job = launch(2, DETECTOR, *options, *QUICK, seconds=100)
    assert job.returncode == 0, job.stdout
    assert largest_difference(metrics(tmp_path), whole_batch) <= 1e-9


def test_local_batch_norm_does_not(tmp_path: Path, whole_batch: dict[str, object]) -> None:
    """Negative control."""
    options = ("--images-per-process", "2", "--norm", "batch", "--steps", "10", "--output", str(tmp_path))
    command = ["bash", "launch/torchrun.sh", "--procs-per-node", "2", "--", DETECTOR, *options, *QUICK]
    job = run_job(command, seconds=100)
    assert job.returncode == 0, job.stdout
    assert largest_difference(metrics(tmp_path), whole_batch) > 1e-3


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, whole_batch: dict[str, object]
) -> None:
    alone(tmp_path, "--steps", "4")
    resumed = alone(tmp_path, "--steps", "10", "--resume")
    assert resumed["losses"] == whole_batch["losses"]
    assert resumed["parameters_sha256"] == whole_batch["parameters_sha256"]


def test_a_checkpoint_that_does_not_match_is_refused_by_every_rank(launch, tmp_path: Path) -> None:
    alone(tmp_path, "--steps", "2", norm="sync")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    options = ("--images-per-process", "2", "--norm", "sync", "--resume", "--seed", "7", "--output", str(tmp_path))
    job = launch(2, DETECTOR, *options, "--steps", "4", *QUICK, seconds=60)
    assert job.returncode != 0
    assert "seed" in job.stdout
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_killed_run_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Killed while it writes a checkpoint at every step."""
    options = ("--checkpoint-every", "1", "--test-canvases", "1", "--output", str(tmp_path))
    job = start_job([sys.executable, DETECTOR, *options, "--steps", "2000"])
    checkpoint = tmp_path / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(job.pid, signal.SIGKILL)  # its own group, which we started
    job.communicate()
    steps = len(torch.load(checkpoint, weights_only=True)["losses"])
    assert steps >= 1
    resumed = run_job([sys.executable, DETECTOR, *options, "--steps", str(steps + 2), "--resume"], seconds=60)
    assert resumed.returncode == 0, resumed.stdout
    assert len(metrics(tmp_path)["losses"]) == steps + 2
