"""What the launch scripts tell malloc, as a command line and in real ranks, and what doctor says where nobody did."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAUNCHERS, run_job

from syncbn.cli import _installation
from syncbn.cluster._malloc import SETTINGS, gives_memory_back, keep_memory

SET = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "9223372036854775807"}
USERS_OWN = [
    {"MALLOC_MMAP_MAX_": "5"},
    {"MALLOC_MMAP_THRESHOLD_": "65536"},
    {"MALLOC_TRIM_THRESHOLD_": "65536"},
    {"MALLOC_TOP_PAD_": "65536"},
    {"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off:glibc.malloc.hugetlb=0"},
    {"LD_PRELOAD": "libjemalloc.so.2"},
]
NOT_OF_MALLOC = [{}, {"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, {"LD_PRELOAD": "libm.so.6"}, {"MALLOC_ARENA_MAX": "2"}]

# Prints its settings, and how many MB stay with it of the 64 that it takes and frees.
JOB = """
import json, os
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
memory = bytearray(2**26)
del memory
mine = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
print(json.dumps([mine, resident() - before]) + "\\n", end="", flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SETTINGS, "GLIBC_TUNABLES", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "a job.py"  # a space: the scripts must quote
    file.write_text(JOB)
    return str(file)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`program(name, text)`: a shell script, found before any other program of that name."""

    def make(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return make


def dry_run(launcher: str, job: str, **env: str) -> dict[str, str]:
    """Return the settings of malloc that the script's command line has."""
    command = ["bash", f"launch/{launcher}.sh", "--procs-per-node", "1", "--dry-run", "--", job]
    done = run_job(command, seconds=20, env=env)
    assert done.returncode == 0, done.stdout
    words = done.stdout.splitlines()[-1].split()
    return dict(word.split("=", 1) for word in words if word.startswith("MALLOC_"))


def ranks(output: str) -> list[tuple[dict[str, str], float]]:
    """What JOB printed; horovodrun puts the rank before each line."""
    lines = [line[line.index("[{") :] for line in output.splitlines() if "[{" in line]
    return [tuple(json.loads(line)) for line in lines]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_line(launcher: str, job: str) -> None:
    if launcher == "horovodrun":
        pytest.importorskip("horovod", reason="Horovod is not installed")
    assert dry_run(launcher, job) == SET
    assert dry_run(launcher, job, MALLOC_TRIM_THRESHOLD_="65536") == {}


@pytest.mark.parametrize("env", USERS_OWN, ids=str)
def test_the_users_own_setting_is_kept(env: dict[str, str], job: str) -> None:
    assert dry_run("torchrun", job, **env) == {}
    assert not gives_memory_back(env)


@pytest.mark.parametrize("env", NOT_OF_MALLOC, ids=str)
def test_what_is_no_setting_of_malloc(env: dict[str, str], job: str) -> None:
    assert dry_run("torchrun", job, **env) == SET
    assert gives_memory_back(env)


@pytest.mark.parametrize(
    ("said", "visible", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'", None, {}),
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "0", {}),
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "", SET),  # a job on the CPUs of a host with GPUs
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", None, SET),
    ],
)
def test_not_on_gpus(program, job: str, said: str, visible: str | None, expected: dict[str, str]) -> None:
    program("nvidia-smi", said)
    assert dry_run("torchrun", job, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})) == expected


def test_not_where_libc_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keep_memory({}) == SET
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not gives_memory_back({})
    assert keep_memory({}) == {}


def slurm_rank(job: str, **env: str) -> list[tuple[dict[str, str], float]]:
    names = ("JOB_ID", "STEP_NUM_TASKS")
    zeros = ("PROCID", "LOCALID", "NODEID", "GTIDS")
    step = {**{f"SLURM_{name}": "1" for name in names}, **{f"SLURM_{name}": "0" for name in zeros}}
    command = ["bash", "launch/slurm-rank.sh", job]
    done = run_job(command, seconds=20, env={**step, "SLURM_STEP_NODELIST": "node1", **env})
    assert done.returncode == 0, done.stdout
    return ranks(done.stdout)


def test_a_rank_under_slurm(program, job: str) -> None:
    program("scontrol", "echo node1")
    ((settings, kept),) = slurm_rank(job)
    assert (settings, kept > 60) == (SET, True)
    ((settings, kept),) = slurm_rank(job, MALLOC_TOP_PAD_="4096")
    assert (settings, kept < 4) == ({"MALLOC_TOP_PAD_": "4096"}, True)


@pytest.mark.launcher
@pytest.mark.timeout(90)
@pytest.mark.parametrize("own", [{}, {"MALLOC_TOP_PAD_": "4096"}], ids=["ours", "the-users"])
def test_real_ranks(launch, job: str, own: dict[str, str]) -> None:
    done = launch(2, job, env=own)
    assert done.returncode == 0, done.stdout
    for settings, kept in (both := ranks(done.stdout)):
        assert settings == (own or SET)
        assert kept < 4 if own else kept > 60
    assert len(both) == 2


def test_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_comes = _installation._malloc()
    assert as_it_comes.state == "ok"
    assert all(f"{name}={value}" in as_it_comes.remedy for name, value in SET.items())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert _installation._malloc().remedy == ""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert _installation._malloc().remedy == ""


@pytest.mark.launcher
@pytest.mark.timeout(90)
@pytest.mark.parametrize("env", [{}, SET], ids=["as-it-comes", "set"])
def test_a_job_that_no_script_started(env: dict[str, str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--nproc-per-node=1", "-m", "syncbn", "doctor"]
    done = run_job(command, seconds=80, env={"GLOO_SOCKET_IFNAME": "lo", **env})
    assert done.returncode == 0, done.stdout
    assert ("hint: rank 0: malloc gives the memory of large tensors back" in done.stdout) == (not env)
