"""Situations from public reports, on real processes that called init_process_group themselves, not syncbn.init.

Each compares with one process that has the whole batch, in float64: losses, gradients and statistics within 1e-9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm import run_threads

IMAGES = 3  # of one replica
MICRO_BATCHES = 3


class Forked(nn.Module):
    """A trunk that is normalised, and a side branch, without normalisation, that a replica may leave out.

    In backward the middle's sums come before the side's gradients; where the side is left out, DDP knows its gradients
    at once. So DDP's reductions and the layers' start in another order on another replica.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten(1), nn.Linear(12, 2))

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The side branch counts by `weights`, one number an image; None leaves it out."""
        x = self.stem(x)
        side = 0 if weights is None else weights.view(-1, 1, 1, 1) * self.side(x)
        return self.head(self.middle(x) + side)


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


def batch(number: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(images, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x * (1 + number), torch.randn(images, 2, generator=generator, dtype=torch.float64)


def mine(rank: int) -> slice:
    return slice(IMAGES * rank, IMAGES * (rank + 1))


def assert_same(ours: nn.Module, whole: nn.Module) -> None:
    """Gradients and state; the reference's loss is the mean over all, and so is the mean of the replicas'."""
    for (name, p), q in zip(ours.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for (name, value), expected in zip(ours.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@contextlib.contextmanager
def environment(shared_memory: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_SHARED_MEMORY", shared_memory)
        yield


# A branch that is unused on one replica


def _branch_unused(rank: int, size: int, shared_memory: str) -> None:
    with environment(shared_memory):
        group = dist.new_group(
            timeout=timedelta(seconds=20)
        )  # the transport of a group is chosen when it is first used
        net = syncbn.convert_sync_batchnorm(made(Forked), process_group=group)
        parallel = DistributedDataParallel(
            net,
            process_group=group,
            find_unused_parameters=True,
            broadcast_buffers=False,
            bucket_cap_mb=1e-6,  # a bucket for each parameter
        )
        whole = made(Forked)
        for step in range(3):
            x, target = batch(step, IMAGES * size)
            used = torch.ones(IMAGES * size, dtype=torch.float64)
            leaver = step % 2  # the rank that leaves it out
            used[mine(leaver)] = 0
            net.zero_grad()
            whole.zero_grad()
            out = parallel(x[mine(rank)], None if rank == leaver else used[mine(rank)])
            nn.functional.mse_loss(out, target[mine(rank)]).backward()
            nn.functional.mse_loss(whole(x, used), target).backward()
            assert_same(net, whole)


@pytest.mark.parametrize("shared_memory", ["1", "0"], ids=["shared memory", "sockets"])
def test_ddp_with_a_branch_unused_on_one_rank(gloo, shared_memory: str) -> None:
    """The layers' sums and DDP's meet in another order there: they must not share a queue."""
    gloo(2, _branch_unused, shared_memory)


# Gradient accumulation


def _accumulates(rank: int, size: int, synchronised: bool) -> None:
    net = syncbn.convert_sync_batchnorm(made(Forked)) if synchronised else made(Forked)
    parallel = DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=True)
    whole = made(Forked)
    for micro in range(MICRO_BATCHES):
        x, target = batch(micro, IMAGES * size)
        with contextlib.nullcontext() if micro == MICRO_BATCHES - 1 else parallel.no_sync():
            nn.functional.mse_loss(parallel(x[mine(rank)], x.new_ones(IMAGES)), target[mine(rank)]).backward()
        nn.functional.mse_loss(whole(x, x.new_ones(IMAGES * size)), target).backward()
    assert_same(net, whole)


def test_gradient_accumulation_with_no_sync(gloo) -> None:
    gloo(2, _accumulates, True)


def _local_differs(rank: int, size: int) -> None:
    with pytest.raises(AssertionError):
        _accumulates(rank, size, False)


def test_gradient_accumulation_with_local_statistics_differs(gloo) -> None:
    """Negative control of the comparison."""
    gloo(2, _local_differs)


def _accumulates_by_hand(rank: int, size: int) -> None:
    """The same without DDP: every replica adds up its own gradients, which are averaged once."""
    net = made(Forked)
    if rank:
        for tensor in net.state_dict().values():
            tensor.zero_()
    syncbn.convert_sync_batchnorm(net)
    syncbn.broadcast_parameters(net)
    whole = made(Forked)
    counts = [2, 4]
    parts = torch.arange(6).split(counts)
    for micro in range(MICRO_BATCHES):
        x, target = batch(micro, 6)
        weights = torch.arange(6.0, dtype=torch.float64)
        here = parts[rank]
        total = nn.functional.mse_loss(net(x[here], weights[here]), target[here], reduction="sum")
        syncbn.global_mean(total, 2 * counts[rank]).backward()
        nn.functional.mse_loss(whole(x, weights), target).backward()
    syncbn.average_gradients(net)
    assert_same(net, whole)


def test_gradient_accumulation_without_ddp_and_with_unequal_parts(gloo) -> None:
    gloo(2, _accumulates_by_hand)


# A pipeline of two stages, each on two replicas: ranks 0 and 1 have the first, 2 and 3 the second


def stages() -> list[nn.Module]:
    both = made(Forked)
    return [both.stem, both.head]


SCHEDULES = {  # what each stage does: forward or backward of which micro-batch
    "GPipe": ("F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2"),
    "1F1B": ("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"),
}


def _pipeline(rank: int, size: int, schedule: str) -> None:
    groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    stage, replica = divmod(rank, 2)
    peer = (rank + 2) % 4
    whole = stages()
    net = syncbn.convert_sync_batchnorm(stages()[stage], process_group=groups[stage])
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    sent = []
    for action, micro in map(tuple, SCHEDULES[schedule][stage].split()):
        x, target = batch(int(micro), 2 * IMAGES)
        x, target = x[mine(replica)], target[mine(replica)]
        if action == "F":
            if stage == 1:
                x = torch.empty(IMAGES, 4, 2, 2, dtype=torch.float64)
                dist.recv(x, peer, tag=int(micro))
            inputs[micro] = x.requires_grad_()
            outputs[micro] = net(x)
            if stage == 0:
                sent.append((dist.isend(outputs[micro].detach(), peer, tag=int(micro)), outputs[micro]))
        elif stage == 1:
            nn.functional.mse_loss(outputs[micro], target).backward()
            sent.append((dist.isend(inputs[micro].grad, peer, tag=100 + int(micro)), inputs[micro]))
        else:
            gradient = torch.empty_like(outputs[micro])
            dist.recv(gradient, peer, tag=100 + int(micro))
            outputs[micro].backward(gradient)
    for work, _ in sent:
        work.wait()
    syncbn.average_gradients(net, process_group=groups[stage])
    for micro in range(MICRO_BATCHES):
        x, target = batch(micro, 2 * IMAGES)
        nn.functional.mse_loss(whole[1](whole[0](x)), target).backward()
    assert_same(net, whole[stage])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_of_replicated_stages(gloo, schedule: str) -> None:
    gloo(4, _pipeline, schedule)


# Two worlds in one process


def _two_worlds(rank: int, size: int) -> None:
    """Ranks that are processes, and in each of them ranks that are threads; steps alternate."""
    across = syncbn.convert_sync_batchnorm(made(Forked), process_group=dist.group.WORLD)
    pair = syncbn.convert_sync_batchnorm(made(Forked), process_group=dist.new_group())
    whole = made(Forked)
    for step in range(2):
        x, target = batch(step, IMAGES * size)
        whole.zero_grad()
        nn.functional.mse_loss(whole(x, x[:, 0, 0, 0]), target).backward()
        for net in (across, pair):
            net.zero_grad()
            part = x[mine(rank)]
            nn.functional.mse_loss(net(part, part[:, 0, 0, 0]), target[mine(rank)]).backward()
        _on_threads(size, x, target)
    for net in (across, pair):
        syncbn.average_gradients(net)
        assert_same(net, whole)


def _on_threads(size: int, x: Tensor, target: Tensor) -> None:
    whole = made(Forked)
    nets = [made(Forked) for _ in range(size)]  # not in the threads: the seed is global
    nn.functional.mse_loss(whole(x, x[:, 0, 0, 0]), target).backward()

    def replica(comm: syncbn.comm.Communicator) -> None:
        net = syncbn.convert_sync_batchnorm(nets[comm.rank], process_group=comm)
        part = x[mine(comm.rank)]
        nn.functional.mse_loss(net(part, part[:, 0, 0, 0]), target[mine(comm.rank)]).backward()
        syncbn.average_gradients(net, process_group=comm)
        assert_same(net, whole)

    run_threads(size, replica)


def test_two_worlds_in_one_process(gloo) -> None:
    gloo(2, _two_worlds)
