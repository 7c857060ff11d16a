"""The launch scripts over two hosts: the same training as on one process, whatever the hosts' own names stand for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_job

DETECTOR = "examples/detect_digits.py"
STEPS = ("--dtype", "float64", "--test-canvases", "2", "--eval-every", "100", "--steps", "5")
STEPS_JOB = "tests/jobs/steps_job.py"
ALL_RANKS = [f"rank {rank} of 4 trains on node{1 + rank // 2}" for rank in range(4)]

pytestmark = pytest.mark.timeout(180)


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "metrics.json").read_text())["losses"], dtype=torch.float64)


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The losses of one process with the whole batch of 4 and nn.BatchNorm2d."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, DETECTOR, "--images-per-process", "4", "--norm", "batch", "--output", str(folder)]
    job = run_job([*command, *STEPS], seconds=100)
    assert job.returncode == 0, job.stdout
    return losses(folder)


def test_two_hosts_train_like_one_process(hosts, launch, launcher: str, tmp_path: Path, whole_batch) -> None:
    options = ("--images-per-process", "1", "--norm", "sync", "--output", str(tmp_path / "run"))
    job = launch(launcher, hosts(2), DETECTOR, *options, *STEPS, seconds=120)
    assert set(job.end()) == {0}, job.stdout
    ours = losses(tmp_path / "run")
    assert len(ours) == len(whole_batch) == 5
    difference = ((ours - whole_batch).abs() / whole_batch.abs()).max().item()
    print(f"{launcher}: largest relative difference of the loss {difference:.1e}")
    assert difference <= 1e-9


@pytest.mark.parametrize("own_name", ["loopback", "missing"])
def test_a_hosts_own_name_need_not_stand_for_its_address(hosts, launch, launcher: str, own_name: str) -> None:
    """As in Debian, where it stands for 127.0.1.1, and in bare containers. The other tests have the third kind."""
    job = launch(launcher, hosts(2, own_name=own_name), STEPS_JOB, 20, 10)
    assert set(job.end()) == {0}, job.stdout
    for rank in ALL_RANKS:
        assert rank in job.stdout


@pytest.mark.parametrize("own_name", ["loopback", "missing"])
def test_nor_on_one_host(hosts, launcher: str, own_name: str) -> None:
    (host,) = hosts(1, own_name=own_name)
    job = host.run("bash", f"launch/{launcher}.sh", "--procs-per-node", "2", "--", STEPS_JOB, "20", "10", seconds=60)
    assert job.returncode == 0, job.stdout
    assert all(f"rank {rank} is done" in job.stdout for rank in range(2))


def test_the_exit_status_of_one_rank_is_not_lost(hosts, launch, launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("import os, socket, sys\nsys.exit(7 if socket.gethostname() == 'node2' else 0)\n")
    job = launch(launcher, hosts(2), script)
    statuses = job.end()
    assert 0 not in statuses, job.stdout
    if launcher == "torchrun":  # whose other hosts know nothing of it
        assert "the job failed on node2: ending it on node1" in job.jobs[0].stdout


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`doctor(status)`: have `syncbn doctor` end so in the ranks on node2, and well in the others."""

    def make(status: int) -> None:
        # Python runs this file first, whatever it is to run. (A package `syncbn` of ours would stand behind an editable
        # installation.)
        (tmp_path / "sitecustomize.py").write_text(
            "import os, socket, sys\n"
            "if 'LOCAL_RANK' in ' '.join(os.environ) and sys.orig_argv[-2:] == ['syncbn', 'doctor']:\n"
            "    print('the doctor is on', socket.gethostname(), flush=True)\n"
            f"    os._exit({status} if socket.gethostname() == 'node2' else 0)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


def test_a_failed_preflight_stops_the_job(hosts, launch, launcher: str, tmp_path: Path, doctor) -> None:
    doctor(3)
    script = tmp_path / "job.py"
    script.write_text("print('the script was started', flush=True)\n")
    job = launch(launcher, hosts(2), script, options=["--preflight"])
    assert 0 not in job.end(), job.stdout
    assert "the doctor is on node2" in job.stdout
    assert "the preflight failed" in job.jobs[0].stdout
    assert "the script was started" not in job.stdout


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_after_a_good_preflight_the_script_starts(hosts, launch, launcher: str, tmp_path: Path, doctor) -> None:
    doctor(0)
    script = tmp_path / "job.py"
    script.write_text("import socket; print('the script is on', socket.gethostname(), flush=True)\n")
    job = launch(launcher, hosts(2), script, options=["--preflight"])
    assert set(job.end()) == {0}, job.stdout
    assert job.stdout.index("the doctor is on node2") < job.stdout.index("the script is on node2")


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("torchrun", "--rdzv-conf=is_host=0,join_timeout=9 --local-addr=10.77.0.1"),
        ("torchrun", "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0"),
        ("torchrun", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        ("torchrun", "--rdzv-endpoint=10.77.0.1:20071 --rdzv-id=71"),  # of SLURM_JOB_ID
        ("mpirun", "--bind-to none --host node1:2,node2:2 --mca btl_tcp_if_include 10.77.0.0/24"),
        ("mpirun", "-x MALLOC_MMAP_MAX_ -x MALLOC_TRIM_THRESHOLD_"),
        ("horovodrun", "-H localhost:2,node2:2 --network-interfaces eth0 --start-timeout 9"),
    ],
)
def test_dry_run_prints_what_was_derived(hosts, launch, monkeypatch, script: str, needed: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    job = launch(script, hosts(2), STEPS_JOB, options=["--dry-run", "--timeout", "9"])
    assert set(job.end()) == {0}
    assert needed in job.jobs[0].stdout.replace("\\", "")
