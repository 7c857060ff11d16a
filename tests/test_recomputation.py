"""Statistics move once for each forward that nn.BatchNorm would count, except where one repeats one that moved them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from reference import Recording, assert_tensor_close, random_batch, randomized, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from syncbn.comm import run_threads

Wrap = Callable[[nn.Module], Callable[[Tensor], Tensor]]


class InBackward(torch.autograd.Function):
    """Run `block` without grad, and again with grad in the backward: what checkpointing by hand comes to."""

    @staticmethod
    def forward(ctx, x, block, first):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return first(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.block(x).backward(dy)
        return x.grad, None, None


def by_hand(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: InBackward.apply(x, block, block)


def as_fairscale(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """fairscale's checkpoint_wrapper switches tracking off in the first forward: the second is the one that counts."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def untracked(x: Tensor) -> Tensor:
        for norm in norms:
            norm.track_running_stats = False
        y = block(x)
        for norm in norms:
            norm.track_running_stats = True
        return y

    return lambda x: InBackward.apply(x, block, untracked)


def checkpointed(*, reentrant: bool, depth: int = 1) -> Wrap:
    def wrap(block: nn.Module) -> Callable[[Tensor], Tensor]:
        for _ in range(depth):
            block = (lambda inner: lambda x: checkpoint(inner, x, use_reentrant=reentrant))(block)
        return block

    return wrap


def in_parts(*, reentrant: bool) -> Wrap:
    part = checkpointed(reentrant=reentrant)
    return lambda block: lambda x: part(block[2:])(part(block[:2])(x))


REPEATS: dict[str, Wrap] = {
    "reentrant": checkpointed(reentrant=True),
    "not reentrant": checkpointed(reentrant=False),
    "nested, reentrant": checkpointed(reentrant=True, depth=2),
    "nested": checkpointed(reentrant=False, depth=3),
    "in parts, reentrant": in_parts(reentrant=True),
    "in parts": in_parts(reentrant=False),
    "parts within a whole": lambda block: checkpointed(reentrant=False)(in_parts(reentrant=False)(block)),
    "by hand": by_hand,
    "fairscale": as_fairscale,
}


def block_of(comm, momentum: float | None) -> nn.Sequential:
    """A layer that occurs twice."""
    norm = randomized(SyncBatchNorm(3, momentum=momentum, process_group=comm))
    linears = [nn.Linear(3, 3) for _ in range(2)]
    for linear in linears:
        nn.init.eye_(linear.weight)
        nn.init.ones_(linear.bias)
    return nn.Sequential(linears[0], norm, nn.Tanh(), linears[1], norm).double()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("wrap", REPEATS.values(), ids=REPEATS)
def test_a_repeated_forward_changes_nothing(wrap: Wrap, momentum: float | None) -> None:
    """Same gradients, statistics moved once, nobody left waiting; in each of two steps."""
    batches = [random_batch([(4, 3)] * 2, seed=seed) for seed in range(2)]

    def train(comm, wrap: Wrap) -> list[Tensor]:
        block = block_of(comm, momentum)
        results = [t for batch in batches for t in step(wrap(block), batch.xs[comm.rank], batch.gs[comm.rank])]
        return [*results, *(p.grad for p in block.parameters()), *block.buffers()]

    plain = run_threads(2, lambda comm: train(comm, lambda block: block))
    repeated = run_threads(2, lambda comm: train(comm, wrap))
    for ours, theirs in zip(itertools.chain(*repeated), itertools.chain(*plain), strict=True):
        assert_tensor_close(ours, theirs)


def test_micro_batches_in_flight() -> None:
    """All forwards, then all backwards, as in a pipeline; the last repetition is not the last forward's."""
    layer = SyncBatchNorm(3)
    losses = [checkpoint(layer, torch.randn(4, 3), use_reentrant=False).square().sum() for _ in range(5)]
    for loss in losses:
        loss.backward()
    assert layer.num_batches_tracked == 5


def test_a_graph_gone_through_twice() -> None:
    layer = SyncBatchNorm(3)
    loss = checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=False).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert layer.num_batches_tracked == 1


def test_the_same_batch_twice_is_two_forwards() -> None:
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3)
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.num_batches_tracked == 2


class Adjoint(torch.autograd.Function):
    """The backward evaluates the layer where the forward never did, as adjoint methods for ODEs do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            for shift in (0.1, 0.2):
                ctx.layer(x.sin() + shift)
        return dy, None


@pytest.mark.parametrize("repeats_too", [False, True])
def test_a_first_forward_inside_a_backward_counts(repeats_too: bool) -> None:
    ours, theirs = SyncBatchNorm(3).double(), nn.BatchNorm1d(3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = Adjoint.apply(leaf, layer)
        if repeats_too and layer is ours:
            y = y + checkpoint(layer, leaf.cos(), use_reentrant=False)
        elif repeats_too:
            y = y + layer(leaf.cos())
        y.sum().backward()
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3 + repeats_too
    if not repeats_too:  # else the order of the moves differs
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_all_empty_replicas_and_nan() -> None:
    layer = SyncBatchNorm(3)
    for x in (torch.empty(0, 3), torch.full((4, 3), torch.nan)):
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 2


def test_the_repetition_is_a_forward_for_the_peers_too() -> None:
    """Every replica issues the same collectives: forward, forward again, backward."""

    def replica(comm):
        recording = Recording(comm)
        layer = SyncBatchNorm(3, process_group=recording)
        step(lambda x: checkpoint(layer, x, use_reentrant=False), torch.randn(4, 3), torch.randn(4, 3))
        return [length for length, _ in recording.calls], layer.num_batches_tracked.item()

    assert run_threads(2, replica) == [([7, 7, 6], 1)] * 2


def test_nothing_is_remembered_of_an_ordinary_forward() -> None:
    """It would be work in every step; and nothing outlives the layer."""
    from syncbn._recomputation import _moved

    before = len(_moved)
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert len(_moved) == before
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert len(_moved) == before + 1
    del layer
    assert len(_moved) == before
