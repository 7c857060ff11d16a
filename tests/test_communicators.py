"""The conformance suite over every communicator, each started by its real launcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conformance import CHECKS, STATES, conformance, states

from syncbn.comm import Communicator, SharedMemory, SingleProcess, TorchDistributed, run_threads
from syncbn.comm._protocol import BaseCommunicator, wait_until
from syncbn.comm._verdict import AGREE
from syncbn.errors import CollectiveError, GroupError


def test_single_process() -> None:
    assert conformance(SingleProcess()) == len(CHECKS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_threads(size: int) -> None:
    assert run_threads(size, conformance) == [len(CHECKS)] * size


def test_the_suite_can_fail() -> None:
    """Negative control: a communicator that averages, and one that keeps its own bits, are caught."""

    class Averages(BaseCommunicator):
        def _sum(self, x: torch.Tensor, signature: int) -> tuple[torch.Tensor, int]:
            return x, AGREE

    with pytest.raises(AssertionError):
        conformance(Averages(0, 2))


@pytest.mark.parametrize("size", [2, 3])
def test_states_of_threads(size: int) -> None:
    """Signals reach the main thread alone, so no interruption here; `Room.wait` has its own test."""
    for check in STATES[:2]:
        run_threads(size, lambda comm, check=check: check(lambda _: comm), timeout=0.3)


def test_a_thread_that_is_interrupted_releases_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def replica(comm: Communicator) -> str:
        if comm.rank == 0:
            monkeypatch.setattr(comm._room.barrier, "wait", _interrupted_wait(comm._room.barrier.wait))
        start = time.monotonic()
        with pytest.raises((KeyboardInterrupt, CollectiveError)) as caught:
            comm.all_reduce(torch.ones(3))
        assert time.monotonic() - start < 5
        return caught.type.__name__

    assert sorted(run_threads(2, replica, timeout=20)) == ["KeyboardInterrupt", "PeerLostError"]


def _interrupted_wait(wait: Callable[[], None]) -> Callable[[], None]:
    """Return a `wait` that once ends with Ctrl-C in this thread (which may serve another rank afterwards)."""
    due = [threading.get_ident()]

    def interrupted() -> None:
        if threading.get_ident() in due:
            due.clear()
            raise KeyboardInterrupt
        wait()

    return interrupted


def _states(rank: int, size: int, way: str) -> int:
    def make(timeout: timedelta) -> TorchDistributed | SharedMemory:
        group = dist.new_group(timeout=timeout)
        return TorchDistributed(group) if way != "direct" else SharedMemory(TorchDistributed(group), timeout=timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_SHARED_MEMORY", "0" if way == "gloo" else "1")
        done = 0
        for check in STATES:
            done += states(make, (check,))
            dist.barrier()
        return done


@pytest.mark.parametrize(("size", "way"), [(2, "gloo"), (3, "gloo"), (2, "shared memory"), (2, "direct")])
def test_states_of_torch_distributed(gloo, size: int, way: str) -> None:
    assert gloo(size, _states, way) == [len(STATES)] * size


def _conformance(rank: int, size: int) -> int:
    return conformance(TorchDistributed())


@pytest.mark.parametrize("size", [2, 3])
def test_gloo(gloo, size: int) -> None:
    assert gloo(size, _conformance) == [len(CHECKS)] * size


@pytest.mark.launcher
@pytest.mark.timeout(120)
def test_real_launcher(launch) -> None:
    """Communicator, groups and layer, started by launch/<launcher>.sh."""
    job = launch(3, "tests/jobs/conformance_job.py", seconds=100)
    assert job.returncode == 0, job.stdout
    for rank in range(3):
        assert (
            f"conformance: {launch.world} rank {rank} of 3: {len(CHECKS)} checks and {len(STATES)} states passed"
            in job.stdout
        )


def _leave_one_out(rank: int, size: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return f"{TorchDistributed(group).size}"
    with pytest.raises(GroupError, match="not in the process group") as caught:
        TorchDistributed(group)
    return str(caught.value)


def test_a_rank_outside_the_group_is_told(gloo) -> None:
    assert gloo(2, _leave_one_out)[0] == "1"


def _one_never_calls(rank: int, size: int) -> str:
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=2))
    if rank == 1:
        dist.barrier()
        return "stayed away"
    with pytest.raises(CollectiveError, match="rank 0 of 2") as caught:
        TorchDistributed(group).all_reduce(torch.ones(3))
    dist.barrier()
    return str(caught.value)


def test_a_peer_that_never_calls_is_an_error_after_the_timeout(gloo) -> None:
    assert "timed out" in gloo(2, _one_never_calls)[0].lower()


def test_waiting_has_an_end() -> None:
    looks = iter([False, False, True])
    assert wait_until(lambda: next(looks), 10, SingleProcess())
    assert not wait_until(lambda: False, 0.01, SingleProcess())
