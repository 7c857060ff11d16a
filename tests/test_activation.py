"""Activation and addition in the norm's own passes: against the norm, the addition and the activation one by one."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import ACTIVATIONS, TIGHT, Recording, Unreachable, assert_tensor_close, on_rows, random_batch, randomized
from test_tracing import Watching
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import DTypeError, InputError
from syncbn.functional import sync_batch_norm
from syncbn.kernels import composed_only

SHAPES = [(3, 4, 5, 2), (0, 4, 5, 2), (2, 4, 3)]  # one replica's is empty, one has another number of dimensions


def step(forward, x, g, residual):
    """Run forward and backward of (y·g).sum(); return y and the gradients of x and of the residual."""
    x = x.detach().clone().requires_grad_()
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    y = forward(x, residual)
    (y * g).sum().backward()
    return y.detach(), x.grad, None if residual is None else residual.grad


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("dtype", TIGHT, ids=str)
@pytest.mark.parametrize("path", ["kernels", "composed", "operations"])
def test_equals_the_whole_batch(dtype, activation, with_residual, path):
    batch, others = random_batch(SHAPES, dtype), random_batch(SHAPES, dtype, seed=7)
    residuals = others.xs if with_residual else [None] * 3
    whole = randomized(nn.BatchNorm1d(4)).double()
    leaves = [x.double().clone().requires_grad_() for x in batch.xs]
    added = [None if r is None else r.double().clone().requires_grad_() for r in residuals]
    normalised = on_rows(whole, leaves)
    expected = [y if r is None else y + r for y, r in zip(normalised, added, strict=True)]
    expected = [y if activation is None else activation(y) for y in expected]
    sum((y * g.double()).sum() for y, g in zip(expected, batch.gs, strict=True)).backward()

    def replica(comm):
        layer = randomized(SyncBatchNorm(4, process_group=comm, activation=activation))
        arguments = batch.xs[comm.rank], batch.gs[comm.rank], residuals[comm.rank]
        if path == "operations":
            with Watching():
                return layer, step(layer, *arguments)
        return layer, step(layer, *arguments)

    with composed_only() if path == "composed" else contextlib.nullcontext():
        layers, results = zip(*run_threads(3, replica), strict=True)
    for (y, dx, dresidual), reference, x, r in zip(results, expected, leaves, added, strict=True):
        assert y.dtype == dx.dtype == dtype
        assert_tensor_close(y, reference.detach(), 2, "y")
        assert_tensor_close(dx, x.grad, 2, "dx")
        if with_residual:
            assert_tensor_close(dresidual, r.grad, 2, "dresidual")
    for name in ("weight", "bias"):
        grad = sum(getattr(layer, name).grad for layer in layers)
        assert_tensor_close(
            grad, getattr(whole, name).grad, 5 if dtype == torch.float64 else 5 * TIGHT[dtype] / TIGHT[grad.dtype], name
        )
    for layer in layers:
        assert_tensor_close(layer.running_mean, whole.running_mean)
        assert_tensor_close(layer.running_var, whole.running_var)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_eval_is_the_same_one_by_one(activation, grad):
    plain, ours = randomized(nn.BatchNorm2d(4)), randomized(SyncBatchNorm(4, process_group=Unreachable()))
    ours.activation = activation
    x, residual = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    before = residual.clone()
    for layer in (plain, ours):
        layer.running_var.fill_(0.25)
        layer.eval()

    def one_by_one(x, residual):
        y = plain(x) + residual
        return y if activation is None else activation(y)

    if grad:
        for a, b in zip(step(ours, x, x, residual), step(one_by_one, x, x, residual), strict=True):
            assert torch.equal(a, b)
    else:
        with torch.no_grad():
            assert torch.equal(ours(x, residual), one_by_one(x, residual))
    assert torch.equal(residual, before)


def test_collectives_are_those_without():
    recording = Recording(SingleProcess())
    layer = SyncBatchNorm(4, process_group=recording, activation="silu")
    x = torch.randn(3, 4, 5, requires_grad=True)
    layer(x, x).sum().backward()
    assert [numel for numel, _ in recording.calls] == [9, 8]


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_what_needs_no_gradient_gets_none(needs, activation):
    recording = Recording(SingleProcess())
    layer = randomized(SyncBatchNorm(4, process_group=recording, activation=activation))
    plain = randomized(nn.BatchNorm1d(4))
    x, residual, g = (torch.randn(3, 4, 5) for _ in range(3))
    ours, theirs = (
        [t.clone().requires_grad_(need) for t, need in zip((x, residual), needs, strict=True)] for _ in "ab"
    )
    layer(*ours).backward(g)
    z = plain(theirs[0]) + theirs[1]
    (z if activation is None else F.relu(z)).backward(g)
    for a, b in zip((*ours, layer.weight, layer.bias), (*theirs, plain.weight, plain.bias), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    assert len(recording.calls) == 1 + needs[0]


def saved(forward):
    """Count the numbers that are kept for backward, each storage once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()  # alive until all are counted
    del y
    return sum(storages.values())


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_keeps_the_input_and_what_the_norm_alone_keeps(activation):
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    alone, fused = SyncBatchNorm(8), SyncBatchNorm(8, activation=activation)
    assert saved(lambda: fused(x)) == saved(lambda: alone(x)) + 8 * 4  # the bias
    assert saved(lambda: F.relu(alone(x))) == saved(lambda: alone(x)) + x.numel() * 4


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_compiled(activation, with_residual):
    torch.compiler.reset()
    eager = randomized(SyncBatchNorm(4, activation=activation))
    layer = copy.deepcopy(eager)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    residual = torch.randn(3, 4, 5, 2).to(memory_format=torch.channels_last) if with_residual else None
    for a, b in zip(step(graph, x, g, residual), step(eager, x, g, residual), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert torch.equal(layer.weight.grad, eager.weight.grad)
    assert torch.equal(layer.running_var, eager.running_var)
    for module in (layer, eager):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(graph(x, residual), eager(x, residual))


def test_checkpointed():
    eager = randomized(SyncBatchNorm(4, activation="silu"))
    layer = copy.deepcopy(eager)
    x, g, residual = (torch.randn(3, 4, 5) for _ in range(3))
    again = step(lambda *t: checkpoint(layer, *t, use_reentrant=False), x, g, residual)
    for a, b in zip(again, step(eager, x, g, residual), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(layer.running_mean, eager.running_mean)


def test_under_torch_func_grad():
    x, residual = torch.randn(6, 4).double(), torch.randn(6, 4).double()

    def loss(norm):
        return lambda x, r: norm(x, r).square().sum()

    ours = loss(lambda x, r: sync_batch_norm(x, activation="silu", residual=r))
    theirs = loss(lambda x, r: F.silu(F.batch_norm(x, None, None, training=True) + r))
    found, expected = (torch.func.grad(f, argnums=(0, 1))(x, residual) for f in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_under_autocast():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4, activation="relu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 5, 5))
    assert y.dtype == torch.bfloat16
    assert (y >= 0).all()
    y.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
def test_traced():
    layer = randomized(SyncBatchNorm(4, activation="hardswish"))
    x, residual = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    traced = torch.jit.trace(layer, (x, residual), check_trace=False)
    torch.testing.assert_close(traced(x, residual), layer(x, residual))
    symbolic = torch.fx.symbolic_trace(Block(layer))
    assert torch.equal(symbolic(x, residual), layer(x, residual))


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        return self.norm(x, residual)


def test_modified_operands_are_noticed():
    """As with nn.BatchNorm and its weight: backward would compute with other values than forward did."""
    layer, x = SyncBatchNorm(4, activation="relu"), torch.randn(6, 4, requires_grad=True)
    residual = torch.randn(6, 4)
    for operand in (layer.bias, residual):
        y = layer(x, residual)
        with torch.no_grad():
            operand.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_bad_input_is_refused_before_any_collective(training):
    layer = SyncBatchNorm(4, process_group=Unreachable(), activation="relu").train(training)
    x = torch.randn(3, 4, 5)
    for residual, error, words in (
        (torch.randn(3, 4, 1), InputError, r"residual of the input's shape \(3, 4, 5\), got \(3, 4, 1\)"),
        (torch.randn(4), InputError, "residual of the input's shape"),
        (x.double(), DTypeError, r"residual of the input's dtype torch.float32, got torch.float64"),
        (x.long(), DTypeError, "floating-point residual"),
        (x.to("meta"), InputError, "expected residual on cpu, where the input is, got meta"),
    ):
        with pytest.raises(error, match=words):
            layer(x, residual)
    with pytest.raises(InputError, match="expected weight on cpu"):
        sync_batch_norm(x, weight=torch.ones(4, device="meta"), process_group=Unreachable(), training=training)


@pytest.mark.parametrize(
    "unknown", ["gelu", "ReLU", nn.GELU(), nn.ReLU, torch.relu, 3, nn.Sequential(nn.ReLU())], ids=str
)
def test_unknown_activations_are_refused_by_name(unknown):
    for use in (
        lambda: SyncBatchNorm(4, activation=unknown),
        lambda: setattr(SyncBatchNorm(4), "activation", unknown),
        lambda: sync_batch_norm(torch.randn(3, 4), process_group=Unreachable(), activation=unknown),
    ):
        with pytest.raises(InputError, match=r"(?s)activation=.*relu, leaky_relu, silu, hardswish"):
            use()


def test_the_layer_says_what_it_does_and_stays_what_it_is():
    layer = SyncBatchNorm(4, activation=nn.LeakyReLU(0.1))
    assert repr(layer).endswith("activation=leaky_relu(0.1))")
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.activation == layer.activation == ("leaky_relu", 0.1)
    layer.activation = nn.Identity()
    assert layer.activation is None
    assert "activation" not in repr(layer)
    converted = convert_sync_batchnorm(nn.BatchNorm2d(4))
    converted.activation = "relu"
    assert (converted(torch.randn(3, 4, 2, 2)) >= 0).all()
