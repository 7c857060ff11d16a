"""torch.compile: the first step, every group, checkpoints; ranks that compile among ranks that do not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference import Batch, on_rows, random_batch, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.comm import TorchDistributed
from syncbn.kernels import composed_only

BACKENDS = ["aot_eager", "inductor"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), randomized(nn.BatchNorm2d(3)), nn.ReLU(), nn.BatchNorm2d(3)).double()


def batch(size: int, seed: int, images: Callable[[int], int] = lambda rank: 2 + rank) -> Batch:
    """Unequal replicas."""
    xs, _ = random_batch([(images(rank), 2, 6, 6) for rank in range(size)], seed=seed)
    _, gs = random_batch([(images(rank), 3, 4, 4) for rank in range(size)], seed=seed)
    return Batch(xs, gs)


def whole_batch(batches: list[Batch]) -> tuple[list[Tensor], nn.Module]:
    """Return nn.BatchNorm2d's input gradients over all replicas, batch by batch and rank by rank, and the model."""
    net, grads = model(), []
    for xs, gs in batches:
        leaves = [x.clone().requires_grad_() for x in xs]
        (net(torch.cat(leaves)) * torch.cat(gs)).sum().backward()
        grads += [leaf.grad for leaf in leaves]
    return grads, net


def train_as_whole_batch(rank: int, size: int, net: nn.Module, run: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
    """Train `run`, which runs `net`, on two batches, and compare all that comes out with the whole batch."""
    batches = [batch(size, seed, **kwargs) for seed in range(2)]
    expected, whole = whole_batch(batches)
    for number, (xs, gs) in enumerate(batches):
        x = xs[rank].clone().requires_grad_()
        (run(x) * gs[rank]).sum().backward()
        torch.testing.assert_close(x.grad, expected[number * size + rank], rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        total = ours.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, theirs.grad, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(net.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def _compiled(rank: int, size: int, backend: str, how: str) -> None:
    torch._dynamo.reset()
    net = syncbn.convert_sync_batchnorm(model())
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    run = {
        "plain": compiled,
        "checkpoint of compiled": lambda x: checkpoint(compiled, x, use_reentrant=False),
        "reentrant checkpoint of compiled": lambda x: checkpoint(compiled, x, use_reentrant=True),
        "compiled checkpoint": torch.compile(
            lambda x: checkpoint(net, x, use_reentrant=False), backend=backend, fullgraph=True
        ),
    }[how]
    train_as_whole_batch(rank, size, net, run)
    x = batch(size, 9).xs[rank]
    torch.testing.assert_close(compiled.eval()(x), copy.deepcopy(net).eval()(x))


HOW = ["plain", "checkpoint of compiled", "reentrant checkpoint of compiled", "compiled checkpoint"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("backend", "how"), [("inductor", "plain"), *(("aot_eager", how) for how in HOW)])
def test_compiled_without_a_graph_break(gloo, backend: str, how: str) -> None:
    gloo(2, _compiled, backend, how, seconds=100)


def _function(rank: int, size: int) -> None:
    """The function, with each kind of group as an argument or from outside, first seen by the compiler."""
    xs, _ = random_batch([(4, 3)] * size)
    expected = on_rows(nn.BatchNorm1d(3).double(), xs)[rank]
    group = dist.new_group(list(range(size)))
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    for spec in (None, "world", "node", size, group, mesh, TorchDistributed(dist.new_group(list(range(size))))):
        torch._dynamo.reset()

        @torch.compile(backend="aot_eager", fullgraph=True)
        def run(x: Tensor, spec: Any = spec) -> Tensor:
            return syncbn.functional.sync_batch_norm(x, process_group=spec)

        torch.testing.assert_close(run(xs[rank]), expected, msg=lambda text, spec=spec: f"{spec}: {text}")
        torch._dynamo.reset()
        layer = syncbn.SyncBatchNorm(3, process_group=spec).double()
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(xs[rank]), expected)


def test_every_kind_of_group(gloo) -> None:
    gloo(2, _function)


def _mixed(rank: int, size: int) -> None:
    """Compiled kernels, the composed definition and a compiled model on three ranks."""
    torch._dynamo.reset()
    net = syncbn.convert_sync_batchnorm(model())
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if rank == 2 else net
    with composed_only() if rank == 1 else contextlib.nullcontext():
        train_as_whole_batch(rank, size, net, run)


def test_ranks_on_different_paths(gloo) -> None:
    gloo(3, _mixed)


def _over_the_limit(rank: int, size: int) -> None:
    """Rank 1 sees another size in each step: its compiler gives up and runs eagerly."""
    torch._dynamo.reset()
    net = syncbn.convert_sync_batchnorm(model())
    with torch._dynamo.config.patch(recompile_limit=1):
        run = torch.compile(net, backend="aot_eager", dynamic=False)
        for images in (2, 3, 4, 5):
            copied = copy.deepcopy(net.state_dict())
            net.zero_grad()
            net.load_state_dict(model().state_dict())
            train_as_whole_batch(rank, size, net, run, images=lambda r, n=images: n if r else 2)
            assert copied.keys() == net.state_dict().keys()
    assert rank == 0 or torch._dynamo.utils.counters["unimplemented"] or torch._dynamo.utils.counters["stats"]


@pytest.mark.filterwarnings("ignore")
def test_a_rank_over_the_recompile_limit(gloo) -> None:
    gloo(2, _over_the_limit)


def _second_derivative(rank: int, size: int) -> list[Tensor]:
    """One rank's first backward keeps a graph, the other's does not: what they send means the same."""
    xs, gs = random_batch([(4, 3)] * size)
    x = xs[rank].clone().requires_grad_()
    y = syncbn.SyncBatchNorm(3).double()(x)
    (dx,) = torch.autograd.grad(y, x, gs[rank], create_graph=rank == 0)
    leaves = [x.clone().requires_grad_() for x in xs]
    sum((y * g).sum() for y, g in zip(on_rows(nn.BatchNorm1d(3).double(), leaves), gs, strict=True)).backward()
    torch.testing.assert_close(dx, leaves[rank].grad, rtol=1e-10, atol=1e-12)


def test_a_backward_that_keeps_its_graph_among_others(gloo) -> None:
    gloo(2, _second_derivative)


def _fallback_free(rank: int, size: int) -> int:
    """Blocks that share code are compiled once: neither the group nor a layer's name is a reason to compile anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4)])
    for block in syncbn.convert_sync_batchnorm(blocks):
        torch.compile(block, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 4, 4))
    plain = [nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4)]
    ours = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in plain:
        torch.compile(block, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 4, 4))
    return ours - torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_no_compilation_beyond_nn_batch_norms(gloo) -> None:
    assert gloo(2, _fallback_free) == [0, 0]


@pytest.mark.launcher
@pytest.mark.timeout(300)
def test_under_a_real_launcher(launch) -> None:
    """The first step over each kind of group; a model that is trained and evaluated, static, dynamic and fused."""
    job = launch(3, "tests/jobs/compile_job.py", seconds=280)
    assert job.returncode == 0, job.stdout
    for rank in range(3):
        counts = "graph breaks: 0, graphs beyond: [0, 0]"
        assert f"compiled: {launch.world} rank {rank} of 3, {counts}" in job.stdout


def test_a_graph_break_is_counted() -> None:
    """Negative control of the count that the job prints."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = syncbn.SyncBatchNorm(3).requires_grad_(False)  # or torch warns of its own look at .grad

    def run(x: Tensor) -> Tensor:
        x = layer(x)
        torch._dynamo.graph_break()
        return layer(x)

    torch.compile(run, backend="aot_eager")(torch.randn(4, 3))
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1


def test_only_the_output_of_the_operation_has_a_gradient() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    outputs = torch.ops.syncbn.forward(x, None, None, None, "", 0.0, None, None, None, None, 1e-5, "world", "", None)
    assert [output.requires_grad for output in outputs] == [True, False, False]
