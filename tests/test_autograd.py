"""Gradients to any order, and the ways in which training code uses them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ACTIVATIONS,
    Recording,
    assert_close,
    assert_tensor_close,
    on_rows,
    random_batch,
    randomized,
    replicas,
    step,
    whole_batch,
)
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from syncbn import SyncBatchNorm
from syncbn.comm import run_threads
from syncbn.functional import sync_batch_norm

CHANNELS = 2


class Together(torch.autograd.Function):
    """`fn(comm, *tensors)` on threads as one differentiable function of all replicas' tensors.

    Argument a of replica r is tensor a * size + r, results likewise. The gradient is taken on the threads again, and is
    again such a function: differentiable to any order, which lets gradcheck disturb one replica and look at the others.
    """

    @staticmethod
    def forward(ctx, fn, size, *tensors):
        ctx.fn, ctx.size = fn, size
        ctx.save_for_backward(*tensors)

        def replica(comm):
            with torch.enable_grad():
                return [
                    y.detach() for y in fn(comm, *(t.detach().requires_grad_() for t in tensors[comm.rank :: size]))
                ]

        return tuple(itertools.chain(*zip(*run_threads(size, replica), strict=True)))

    @staticmethod
    def backward(ctx, *grads):
        arguments = len(ctx.saved_tensors) // ctx.size

        def gradient(comm, *tensors):
            inputs, upstream = tensors[:arguments], tensors[arguments:]
            outputs = ctx.fn(comm, *inputs)
            return torch.autograd.grad(
                outputs, inputs, upstream, create_graph=True, allow_unused=True, materialize_grads=True
            )

        return None, None, *Together.apply(gradient, ctx.size, *ctx.saved_tensors, *grads)


def normalise(comm, x, weight, bias):
    return [sync_batch_norm(x, None, None, weight, bias, process_group=comm)]


def arguments_of(shapes):
    """Every replica's x, weight and bias, in the order that `Together` asks for."""
    xs, _ = random_batch(shapes)
    layer = randomized(nn.BatchNorm1d(CHANNELS)).double()
    repeated = [p.detach().clone() for p in (layer.weight, layer.bias) for _ in xs]
    return [tensor.requires_grad_() for tensor in (*xs, *repeated)]


SHAPES = [[(3, 2)], [(3, 2), (1, 2, 2)], [(2, 2), (0, 2), (1, 2)]]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradcheck(shapes):
    assert torch.autograd.gradcheck(lambda *t: Together.apply(normalise, len(shapes), *t), arguments_of(shapes))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradgradcheck(shapes):
    assert torch.autograd.gradgradcheck(lambda *t: Together.apply(normalise, len(shapes), *t), arguments_of(shapes))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
def test_gradients_through_activation_and_residual(activation, check):
    shapes = [(2, 2), (1, 2)]

    def normalise(comm, x, weight, bias, residual):
        return [
            sync_batch_norm(x, None, None, weight, bias, process_group=comm, activation=activation, residual=residual)
        ]

    arguments = arguments_of(shapes)
    residuals, _ = random_batch(shapes, seed=3)
    tensors = [*arguments, *(residual.requires_grad_() for residual in residuals)]
    assert check(lambda *t: Together.apply(normalise, len(shapes), *t), tensors)


def test_gradcheck_sees_a_replica_that_is_not_heard():
    """Negative control: the gradients of a mean that forgets a peer in backward."""

    def deaf(comm, x, weight, bias):
        recording = Recording(comm)
        every, recording.all_reduce = recording.all_reduce, lambda s: every(s) if s.numel() % 2 else s
        return normalise(recording, x, weight, bias)

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *t: Together.apply(deaf, 2, *t), arguments_of([(3, 2), (2, 2)]))


# Gradient penalties, against the whole batch


def r1(score, x):
    (dx,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return dx.square().sum()


def wgan_gp(score, x):
    (dx,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return (dx.flatten(1).norm(dim=1) - 1).square().sum()


@pytest.mark.parametrize("penalty", [r1, wgan_gp])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradient_penalty(world, penalty):
    batch = random_batch([(4, 3, 5)] * world)

    def discriminator(layer, x, g):
        return (layer(x).tanh() * g).flatten(1).sum(1)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm).double())
        x = batch.xs[comm.rank].clone().requires_grad_()
        score = discriminator(layer, x, batch.gs[comm.rank])
        (score.sum() + penalty(score, x)).backward()
        return x.grad, layer.weight.grad, layer.bias.grad

    whole = randomized(nn.BatchNorm1d(3)).double()
    x = torch.cat(batch.xs).requires_grad_()
    score = discriminator(whole, x, torch.cat(batch.gs))
    (score.sum() + penalty(score, x)).backward()

    dx, dweight, dbias = zip(*run_threads(world, replica), strict=True)
    for ours, theirs in [(torch.cat(dx), x.grad), (sum(dweight), whole.weight.grad), (sum(dbias), whole.bias.grad)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# What needs a gradient


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_mask_of_needed_gradients(needs):
    batch = random_batch([(4, 3, 5)] * 2)
    expected = whole_batch(batch)

    def replica(comm):
        recording = Recording(comm)
        layer = randomized(SyncBatchNorm(3, process_group=recording).double())
        leaves = [batch.xs[comm.rank].clone(), layer.weight, layer.bias]
        for leaf, need in zip(leaves, needs, strict=True):
            leaf.requires_grad_(need)
        y = layer(leaves[0])
        assert y.requires_grad == any(needs)
        if any(needs):
            (y * batch.gs[comm.rank]).sum().backward()
        assert len(recording.calls) == 1 + needs[0]
        return [leaf.grad for leaf in leaves]

    x_grads, *parameter_grads = zip(*run_threads(2, replica), strict=True)
    assert [grad is not None for grad in (x_grads[0], *(g[0] for g in parameter_grads))] == list(needs)
    if needs[0]:
        assert_tensor_close(torch.cat(x_grads), torch.cat(expected.dx))
    for need, grads, reference in zip(needs[1:], parameter_grads, (expected.dweight, expected.dbias), strict=True):
        if need:
            assert_tensor_close(sum(grads), reference[0], factor=5)


# Graphs that are not one forward, one backward


def test_two_forwards_one_backward():
    first, second = [random_batch([(4, 3)] * 2, seed=seed) for seed in (1, 2)]
    expected = whole_batch(first, second)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm).double())
        xs = [batch.xs[comm.rank].clone().requires_grad_() for batch in (first, second)]
        ys = [layer(x) for x in xs]
        sum((y * batch.gs[comm.rank]).sum() for y, batch in zip(ys, (first, second), strict=True)).backward()
        return [x.grad for x in xs], layer

    results = run_threads(2, replica)
    ours = [grads[number] for number in range(2) for grads, _ in results]
    for dx, reference in zip(ours, expected.dx, strict=True):
        assert_tensor_close(dx, reference)
    assert_tensor_close(sum(layer.weight.grad for _, layer in results), expected.dweight[0], factor=5)
    assert_tensor_close(results[0][1].running_var, expected.running_var[0])


def test_a_layer_applied_to_its_own_output():
    batch = random_batch([(4, 3)] * 2)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm).double())
        return step(lambda x: layer(layer(x).sin()), batch.xs[comm.rank], batch.gs[comm.rank])

    whole = randomized(nn.BatchNorm1d(3)).double()
    y, dx = step(lambda x: whole(whole(x).sin()), torch.cat(batch.xs), torch.cat(batch.gs))
    ours = run_threads(2, replica)
    assert_tensor_close(torch.cat([part for part, _ in ours]), y)
    assert_tensor_close(torch.cat([part for _, part in ours]), dx)


def test_a_retained_graph_backward_twice():
    batch = random_batch([(4, 3)] * 2)

    def replica(comm):
        layer = SyncBatchNorm(3, process_group=comm).double()
        x = batch.xs[comm.rank].clone().requires_grad_()
        loss = (layer(x) * batch.gs[comm.rank]).sum()
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward()
        return torch.equal(x.grad, 2 * once)

    assert all(run_threads(2, replica))


@pytest.mark.parametrize("weights", [(1, 0, 1), (0, 0, 5), (1, -2, 0.5)], ids=str)
def test_losses_that_weigh_replicas_differently(weights):
    batch = random_batch([(4, 3)] * 3)
    weighted = batch._replace(gs=[g * weight for g, weight in zip(batch.gs, weights, strict=True)])
    assert_close(replicas(weighted), whole_batch(weighted))


def test_other_uses_of_the_output():
    """y used twice, one of them through a view; an upstream gradient that is expanded, not dense."""
    batch = random_batch([(4, 3, 5)] * 2)

    def loss(y):
        return (y * y.detach().cos()).sum() + y.flatten(2)[:, :, 1].sum() + y.mean()

    def replica(comm):
        x = batch.xs[comm.rank].clone().requires_grad_()
        loss(SyncBatchNorm(3, process_group=comm).double()(x)).backward()
        return x.grad

    xs = [x.clone().requires_grad_() for x in batch.xs]
    sum(map(loss, on_rows(nn.BatchNorm1d(3).double(), xs))).backward()
    for dx, x in zip(run_threads(2, replica), xs, strict=True):
        assert_tensor_close(dx, x.grad)


# Changes in place


def test_an_activation_in_place():
    batch = random_batch([(4, 3, 5)] * 2)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm).double())
        return step(lambda x: F.relu(layer(x), inplace=True), batch.xs[comm.rank], batch.gs[comm.rank])

    xs = [x.clone().requires_grad_() for x in batch.xs]
    ys = on_rows(randomized(nn.BatchNorm1d(3)).double(), xs)
    sum((y.relu() * g).sum() for y, g in zip(ys, batch.gs, strict=True)).backward()
    for (_, dx), x in zip(run_threads(2, replica), xs, strict=True):
        assert_tensor_close(dx, x.grad)


def test_an_input_changed_in_place_gives_an_error_or_the_right_gradient():
    batch = random_batch([(4, 3)])
    layer = randomized(SyncBatchNorm(3).double())
    x = batch.xs[0].clone().requires_grad_()
    leaf = x * 1.0
    y = layer(leaf)
    leaf.detach().zero_()  # shares the version counter
    try:
        (y * batch.gs[0]).sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert_tensor_close(x.grad, whole_batch(batch).dx[0])


def test_a_weight_changed_in_place_is_an_error():
    layer = SyncBatchNorm(3)
    y = layer(torch.randn(4, 3, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_input_and_the_upstream_gradient_are_left_alone():
    (x,), (g,) = random_batch([(4, 3, 5)])
    before = x.clone(), g.clone()
    y = SyncBatchNorm(3).double()(x.requires_grad_())
    torch.autograd.grad(y, x, g)
    assert torch.equal(x, before[0])
    assert torch.equal(g, before[1])


# What is kept, and what is sent


def test_it_keeps_the_input_and_2c_numbers():
    saved = []
    x = torch.randn(4, 8, 5, 4, requires_grad=True)
    layer = SyncBatchNorm(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = [t for t in saved if t.data_ptr() not in {x.data_ptr(), layer.weight.data_ptr()}]
    assert [t.shape for t in own] == [(2 * 8 + 1,)]  # mean, 1/√(σ²+ε), and the count


class Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_a_gradient_that_does_not_come_is_zero_to_the_peers():
    """The replica takes part in their collective all the same."""
    batch = random_batch([(4, 3)] * 2)

    def replica(comm):
        recording = Recording(comm)
        x = batch.xs[comm.rank].clone().requires_grad_()
        y = sync_batch_norm(x, process_group=recording)
        (y if comm.rank else Drop.apply(y)).mul(batch.gs[comm.rank]).sum().backward()
        return x.grad, [length for length, _ in recording.calls]

    dropped = batch._replace(gs=[torch.zeros_like(batch.gs[0]), batch.gs[1]])
    for (dx, lengths), expected in zip(run_threads(2, replica), whole_batch(dropped, affine=False).dx, strict=True):
        assert lengths == [7, 6]
        assert_tensor_close(dx, expected)


def test_a_second_derivative_repeats_no_forward():
    def replica(comm):
        recording = Recording(comm)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        y = sync_batch_norm(x, process_group=recording)
        (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        forward_and_backward = len(recording.calls)
        dx.square().sum().backward()
        return [length for length, _ in recording.calls], forward_and_backward

    assert run_threads(2, replica) == [([7, 6, 6, 6, 6], 2)] * 2  # of sums, statistics, and y
