"""Fixtures: a persistent pool of Gloo ranks, and jobs started by the project's launch scripts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

os.environ["TRITON_INTERPRET"] = "1"  # read when the Triton kernels are imported: no GPU is at hand

import interpreter

from syncbn.kernels import composed_only

collect_ignore = ["jobs"]  # scripts: --doctest-modules would import, and so run, them
ROOT = Path(__file__).parents[1]
COLLECTIVE_SECONDS = 20  # a rank waits so long for its peers
TASK_SECONDS = 45


BOTH_PATHS = {
    "test_equivalence",
    "test_extreme",
    "test_collectives",
    "test_autograd",
    "test_precision",
    "test_recomputation",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run these modules over the compiled kernels and over the composed definition; or over the Triton ones."""
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_PATHS:
        paths = ["triton"] if os.environ.get("SYNCBN_KERNELS") == "triton" else ["compiled", "composed"]
        metafunc.parametrize("path", paths, indirect=True)


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Force the kernels that the parameter says; else they are what the installation offers."""
    choice = getattr(request, "param", None)
    if choice == "triton":
        interpreter.install(monkeypatch)
    if choice == "compiled":
        pytest.importorskip("syncbn._native", reason="syncbn was installed without its compiled kernels")
    with composed_only() if choice == "composed" else contextlib.nullcontext():
        yield


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    """One rank of the pool: run what comes through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs with & ignore it
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, fn(rank, size, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class GlooPool:
    """`size` processes that live through the session. They are forked from a server that has imported torch already."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[mp.Process, Connection]] = []

    def start(self) -> None:
        rendezvous = tempfile.mktemp(prefix="syncbn-pool-")
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "syncbn"])
        for rank in range(self.size):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, self.size, rendezvous, there), daemon=True)
            worker.start()
            there.close()  # or the death of the worker would not end our recv
            self.workers.append((worker, here))

    def stop(self, *, kill: bool = False) -> None:
        for worker, pipe in self.workers:
            if kill:
                worker.kill()
            pipe.close()
        for worker, _ in self.workers:
            worker.join()
        self.workers = []

    def run(self, fn: Callable[..., Any], *args: Any, seconds: float = TASK_SECONDS) -> list[Any]:
        """Return `fn(rank, size, *args)` of every rank, in rank order; after `seconds` the pool is killed."""
        if not self.workers:
            self.start()
        for _, pipe in self.workers:
            pipe.send((fn, args))
        answers = [self._answer(rank, seconds) for rank in range(self.size)]
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.stop(kill=True)  # the ranks may be out of step: the next test gets fresh ones
            pytest.fail("\n".join(failures), pytrace=False)
        return [answer for _, answer in answers]

    def _answer(self, rank: int, seconds: float = TASK_SECONDS) -> tuple[bool, Any]:
        worker, pipe = self.workers[rank]
        if not pipe.poll(seconds):
            return False, f"no answer within {seconds} s"
        try:
            return pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionResetError):
            worker.join()
            return False, f"died with exit code {worker.exitcode}"


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, GlooPool]]:
    pools: dict[int, GlooPool] = {}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def gloo(_pools: dict[int, GlooPool]) -> Callable[..., list[Any]]:
    """`gloo(size, fn, *args)`: the results of `fn(rank, size, *args)` on `size` real processes over Gloo."""
    return lambda size, fn, *args, **kwargs: _pools.setdefault(size, GlooPool(size)).run(fn, *args, **kwargs)


def start_job(command: list[str], *, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start `command` in a process group of its own."""
    python = str(Path(sys.executable).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{python}:{os.environ['PATH']}", **(env or {})}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_job(command: list[str], *, seconds: float, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end; beyond the deadline its process group is killed and the test fails."""
    job = start_job(command, **kwargs)
    try:
        output, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        pytest.fail(f"{command} did not end within {seconds} s:\n{output}", pytrace=False)
    return subprocess.CompletedProcess(command, job.returncode, output, None)


LAUNCHERS = {"torchrun": "TorchDistributed", "mpirun": "MPI", "horovodrun": "Horovod"}  # and the world that each makes


@pytest.fixture(params=LAUNCHERS)
def launch(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`launch(procs, script, *args, seconds=…)`: run a script through launch/<launcher>.sh."""

    def run(procs: int, *script: str, seconds: float = 60, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command = ["bash", f"launch/{request.param}.sh", "--procs-per-node", str(procs), "--", *map(str, script)]
        return run_job(command, seconds=seconds, **kwargs)

    run.launcher, run.world = request.param, LAUNCHERS[request.param]  # type: ignore[attr-defined]
    return run
