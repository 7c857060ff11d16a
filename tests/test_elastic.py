"""Worlds that are torn down and set up again inside one process, with another size: training goes on as if alone."""

from __future__ import annotations

import copy
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import COLLECTIVE_SECONDS, run_job
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm import SingleProcess
from syncbn.errors import CollectiveError

SAMPLES = 6  # of a whole batch: divided by 1, 2 and 3 ranks
STEPS = 3  # in each world


def network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(4 * 9, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return (
        torch.randn(SAMPLES, 2, 5, 5, generator=draw, dtype=torch.float64) * 3 + 1,
        torch.randn(SAMPLES, 3, generator=draw, dtype=torch.float64),
    )


def loss_of(model: nn.Module, step: int, rank: int, size: int) -> Tensor:
    """The mean over this rank's share."""
    x, weights = (whole.chunk(size)[rank] for whole in batch(step))
    return (model(x) * weights).sum() / len(x)


def train(model: nn.Module, first: int, rank: int, size: int, ddp: bool, steps: int = STEPS) -> None:
    trained = DistributedDataParallel(model, broadcast_buffers=False) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(trained, step, rank, size).backward()
        if not ddp:
            syncbn.average_gradients(model)
        optimizer.step()


def join(meet: Path, rank: int, size: int) -> None:
    wait = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=wait)


def _worlds(rank: int, _: int, folder: Path, sizes: list[int], group: object, ddp: bool) -> dict[str, Tensor]:
    """Train in worlds of `sizes`, one after the other; a rank too many waits for the next that has room for it."""
    model = syncbn.convert_sync_batchnorm(network(), process_group=group)
    for number, size in enumerate(sizes):
        dist.destroy_process_group()
        if rank >= size:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # alone meanwhile
            continue
        join(folder / str(number), rank, size)
        syncbn.broadcast_parameters(model)  # who was away has the state of then
        train(model, number * STEPS, rank, size, ddp)
    return model.state_dict()


def alone(worlds: int) -> dict[str, Tensor]:
    """One process, torch's layers, the whole batches."""
    model = network()
    train(model, 0, 0, 1, ddp=False, steps=worlds * STEPS)
    return model.state_dict()


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.mark.parametrize("ddp", [False, True], ids=["average_gradients", "DDP"])
@pytest.mark.parametrize("group", [None, "node"])
@pytest.mark.parametrize("sizes", [[2, 1, 2], [3, 2, 3]], ids=str)
def test_training_goes_on_in_a_world_of_another_size(gloo, tmp_path, sizes, group, ddp) -> None:
    for state in gloo(sizes[0], _worlds, tmp_path, sizes, group, ddp):  # ends in a world of the pool's size
        assert largest_difference(state, alone(len(sizes))) <= 1e-12


def test_with_local_statistics_it_would_be_another_training(gloo, tmp_path) -> None:
    """Negative control: layers that do not follow the world."""
    for state in gloo(2, _worlds, tmp_path, [2, 1, 2], SingleProcess(), False):
        assert largest_difference(state, alone(3)) > 1e-3


def _left_behind(rank: int, size: int, folder: Path) -> dict[str, Tensor] | None:
    """The last rank leaves between two steps, without a word; the others notice in the middle of one and go on."""
    model = syncbn.convert_sync_batchnorm(network())
    syncbn.broadcast_parameters(model)
    train(model, 0, rank, size, ddp=False)
    before = copy.deepcopy(model.state_dict())
    if rank == size - 1:
        dist.destroy_process_group()
    else:
        with pytest.raises(CollectiveError):
            train(model, STEPS, rank, size, ddp=False)
        dist.destroy_process_group()
        join(folder / "fewer", rank, size - 1)
        model.load_state_dict(before)
        train(model, STEPS, rank, size - 1, ddp=False)
        dist.destroy_process_group()
    join(folder / "all", rank, size)
    return None if rank == size - 1 else model.state_dict()


def test_the_others_go_on_without_a_rank_that_left(gloo, tmp_path) -> None:
    *states, _ = gloo(3, _left_behind, tmp_path)
    for state in states:
        assert largest_difference(state, alone(2)) <= 1e-12


RESTARTED = """
import torch, horovod.torch as hvd, syncbn
from datetime import timedelta
comm = syncbn.init(timeout=timedelta(seconds=7))
hvd.init()  # of a world that there is: no restart
assert syncbn.world() is comm
hvd.shutdown()
hvd.init()
after = syncbn.world()
assert (after.rank, after.size) == (comm.rank, comm.size)
assert after is not comm and comm.state == "closed" and not comm.exists(), (comm, after)
assert after.timeout == timedelta(seconds=7)
assert syncbn.init() is after
print("restarted")
"""


@pytest.mark.timeout(60)
def test_a_horovod_of_the_same_rank_and_size_is_another_world() -> None:
    """A worker that takes the place of another has made no calls yet, so nobody else may count on."""
    pytest.importorskip("horovod", reason="Horovod is not installed")
    env = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}
    job = run_job([sys.executable, "-c", RESTARTED], seconds=50, env=env)
    assert job.returncode == 0, job.stdout
    assert "restarted" in job.stdout


def horovod_elastic(folder: Path, event: str, hosts: str) -> str:
    """Let horovodrun find `hosts`, each of which is this one, and return what it printed."""
    (folder / "hosts").write_text(hosts)
    discover = folder / "discover.sh"
    discover.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
    discover.chmod(0o755)
    # The interface: else horovodrun begins with two hosts or more.
    counts = ["-np", str(hosts.count(":")), "--min-np", "1", "--max-np", "2", "--network-interfaces", "lo"]
    script = ["python", "tests/jobs/horovod_elastic_job.py", event, f"{folder}/mark", f"{folder}/hosts"]
    command = ["horovodrun", "--gloo", *counts, "--host-discovery-script", str(discover), *script]
    job = run_job(command, seconds=100)
    assert job.returncode == 0, job.stdout
    assert (folder / "mark").exists()
    return job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(240)
def test_horovod_elastic_goes_on_with_fewer_and_with_more_workers(tmp_path) -> None:
    totals = set()
    for event, hosts, worlds in (
        ("killed", "localhost:1\n127.0.0.1:1\n", [(r"\[2, 1\]", "rank 0 of 1")]),
        ("more", "localhost:1\n", [(r"\[1, 2\]", "rank 0 of 2"), (r"\[2\]", "rank 1 of 2")]),
    ):
        folder = tmp_path / event
        folder.mkdir()
        output = horovod_elastic(folder, event, hosts)
        for sizes, place in worlds:
            ended = re.search(rf"worlds {sizes}, in the end {place}: ([\d.]+)", output)
            assert ended, output
            totals.add(ended[1])
    assert len(totals) == 1, totals  # the same training, whoever came and went
