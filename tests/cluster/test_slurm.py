"""Both SLURM batch scripts, on a SLURM of two nodes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from cluster.lab import Host
from cluster.slurm_lab import Cluster, missing_tool, slurm
from conftest import run_job

pytestmark = pytest.mark.timeout(240)

TORCHRUN, SRUN = "launch/slurm.sbatch", "launch/slurm-srun.sbatch"
both = pytest.mark.parametrize("script", [TORCHRUN, SRUN])

DETECTOR = "examples/detect_digits.py"
QUICK = ("--dtype", "float64", "--test-canvases", "2", "--eval-every", "100", "--steps", "5")

# Rank 3, on the second node, does what is asked for while the others wait in a collective.
JOB = """
import os, sys, time, syncbn, torch
comm = syncbn.init()
sys.stdout.write(f"rank {comm.rank} of {comm.size} on {os.uname().nodename}\\n")
sys.stdout.flush()
layer = syncbn.SyncBatchNorm(2)
for step in range(600):
    layer(torch.randn(4, 2))
    time.sleep(0.1)
    if step == 3 and comm.rank == 3:
        exec(sys.argv[1])
"""


@pytest.fixture
def cluster(hosts: Callable[..., list[Host]]) -> Iterator[Cluster]:
    """Two nodes under SLURM."""
    reason = missing_tool()
    if reason is not None:
        pytest.skip(f"no SLURM: {reason}")
    with ExitStack() as stack:
        yield stack.enter_context(slurm(hosts(2)))


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "a job.py"  # a space: the scripts must quote
    file.write_text(JOB)
    return str(file)


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The losses of one process with the whole batch of 4 and nn.BatchNorm2d."""
    folder = tmp_path_factory.mktemp("whole")
    options = ("--images-per-process", "4", "--norm", "batch", "--output", str(folder))
    alone = run_job([sys.executable, DETECTOR, *options, *QUICK], seconds=100)
    assert alone.returncode == 0, alone.stdout
    return losses(folder)


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "metrics.json").read_text())["losses"], dtype=torch.float64)


@both
def test_two_nodes_train_like_one_process(cluster, tmp_path, whole_batch, script) -> None:
    options = ("--images-per-process", "1", "--norm", "sync", "--output", str(tmp_path / "run"))
    job = cluster.submit(script, DETECTOR, *options, *QUICK).wait(120)
    assert (job.state, job.field("ExitCode")) == ("COMPLETED", "0:0"), job.stdout
    assert "4 x 1 = 4 images a step" in job.stdout
    ours = losses(tmp_path / "run")
    assert len(ours) == len(whole_batch) == 5
    assert ((ours - whole_batch).abs() / whole_batch.abs()).max() <= 1e-9
    assert cluster.wait_until_idle(5) < 5


def test_local_batch_norm_does_not(cluster, tmp_path, whole_batch) -> None:
    """Negative control."""
    options = ("--images-per-process", "1", "--norm", "batch", "--output", str(tmp_path / "run"))
    job = cluster.submit(SRUN, DETECTOR, *options, *QUICK).wait(120)
    assert job.state == "COMPLETED", job.stdout
    assert ((losses(tmp_path / "run") - whole_batch).abs() / whole_batch.abs()).max() > 1e-3


@both
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise ArithmeticError('rank 3 is ill')", "ArithmeticError: rank 3 is ill"),
        ("os.kill(os.getpid(), 9)", "(Killed|exitcode.*-9)"),
        ("sys.exit(7)", "(code 7|exitcode.*7)"),
    ],
)
def test_a_failing_rank_ends_the_job(cluster, job, script, end, said) -> None:
    running = cluster.submit(script, job, end).wait_for("rank 3 of 4 on node2", 60).wait(20)
    assert running.state == "FAILED"
    assert running.field("ExitCode") != "0:0"
    assert cluster.wait_until_idle(10) < 10
    assert re.search(said, running.stdout), running.stdout


@both
def test_scancel_leaves_no_process(cluster, job, script) -> None:
    running = cluster.submit(script, job, "pass").wait_for("rank 3 of 4 on node2", 60)
    assert any("a job.py" in command for command in cluster.processes())
    cluster.head.check("scancel", running.number)
    assert running.wait(20).state == "CANCELLED"
    assert cluster.wait_until_idle(15) < 15
