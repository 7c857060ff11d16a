"""Subclasses of nn.BatchNorm* whose forward does more than normalise keep it, over all replicas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import vision
from modules import COPIES, snapshot
from reference import Recording, Unreachable, assert_tensor_close, random_batch, randomized, step
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, convert_sync_batchnorm, fuse_activations, revert_sync_batchnorm, together
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import ConversionError

SHAPE = (2, 3, 4, 4)


class BySuper(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class ByName(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x.exp())


class ByFunction(nn.BatchNorm2d):
    """Counts its batches itself, and uses them for a momentum of None."""

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        training = self.training
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, momentum or 0.0, self.eps
        ).tanh()


class ByOperator(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return -torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, False
        )


class Mixed(type("StepModule", (), {"step": "single"}), nn.BatchNorm2d):  # type: ignore[misc]
    """As spikingjelly's: other bases first, and steps of time in front of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.dim() == 5 else super().forward(x)


class WithNamesOfOurs(nn.BatchNorm2d):
    """Has attributes that are called as properties of our layers."""

    group = "mine"

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.Tanh()
        self.process_group = "a string"

    def forward(self, x: Tensor) -> Tensor:
        assert self.process_group == "a string"
        return self.activation(super().forward(x))


class Wrapped(nn.BatchNorm2d):
    """As torchsparse's: the input is no tensor."""

    class Values(NamedTuple):
        values: Tensor

    def forward(self, x: Any) -> Any:
        return self.Values(super().forward(x.values)) if isinstance(x, self.Values) else super().forward(x)


class WithAnotherNorm(nn.BatchNorm2d):
    """Has a norm layer for itself, of which nobody knows whether it is converted."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.other = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(super().forward(x).exp())


KINDS = (BySuper, ByName, ByFunction, ByOperator, Mixed, WithNamesOfOurs, Wrapped, WithAnotherNorm)
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: type[nn.Module]) -> nn.Module:
    layer = kind(3).double()
    for module in layer.modules():
        if isinstance(module, _BatchNorm):
            randomized(module)
    return layer


def assert_as_whole_batch(make: Callable[[], nn.Module], run: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    """Compare two replicas, two steps and an evaluation, with one process that has the whole batch."""
    batches = [random_batch([SHAPE, (3, *SHAPE[1:])], mean=0.5, seed=seed) for seed in range(2)]
    whole = make()
    expected = [step(whole, torch.cat(batch.xs), torch.cat(batch.gs)) for batch in batches]

    def replica(comm: Any) -> tuple[list[tuple[Tensor, Tensor | None]], nn.Module]:
        layer = convert_sync_batchnorm(make(), comm)
        return [step(run(layer), batch.xs[comm.rank], batch.gs[comm.rank]) for batch in batches], layer

    (steps, first), (others, second) = run_threads(2, replica)
    for (y, dx), ours, theirs in zip(expected, steps, others, strict=True):
        assert_tensor_close(torch.cat([ours[0], theirs[0]]), y, 10)
        assert_tensor_close(torch.cat([ours[1], theirs[1]]), dx, 10)
    for name, parameter in whole.named_parameters():
        total = first.get_parameter(name).grad + second.get_parameter(name).grad
        assert_tensor_close(total, parameter.grad, 20, name)
    for layer in (first, second):
        for name, buffer in whole.named_buffers():
            assert_tensor_close(layer.get_buffer(name), buffer, 10, name)
    x = batches[0].xs[0]
    assert torch.equal(first.eval()(x), copy.deepcopy(revert_sync_batchnorm(first))(x))


@every_kind
def test_equal_to_the_whole_batch(kind) -> None:
    assert_as_whole_batch(lambda: made(kind), lambda layer: layer)


@pytest.mark.parametrize("kind", [BySuper, ByFunction])
def test_compiled_without_a_graph_break(kind) -> None:
    torch._dynamo.reset()
    layer, x = convert_sync_batchnorm(made(kind)), torch.randn(SHAPE, dtype=torch.float64)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(step(compiled, x, x), step(eager, x, x), strict=True):
        assert_tensor_close(ours, theirs)
    assert torch.equal(layer.running_var, eager.running_var)
    assert torch.equal(compiled.eval()(x), eager.eval()(x))


@pytest.mark.parametrize("kind", [BySuper, ByFunction])
def test_checkpointed(kind) -> None:
    """A batch that the layer counts itself is counted twice, as it is without us; all else moves once."""
    batch = random_batch([SHAPE] * 2)

    def replica(comm: Any, *, repeat: bool) -> list[Tensor]:
        layer: Any = convert_sync_batchnorm(made(kind), comm)
        run = (lambda x: checkpoint(layer, x, use_reentrant=False)) if repeat else layer
        y, dx = step(run, batch.xs[comm.rank], batch.gs[comm.rank])
        batches = [layer.num_batches_tracked] if kind is BySuper else []
        return [y, dx, layer.weight.grad, layer.running_mean, layer.running_var, *batches]

    plain = run_threads(2, lambda comm: replica(comm, repeat=False))
    repeated = run_threads(2, lambda comm: replica(comm, repeat=True))
    for ours, theirs in zip(plain, repeated, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_tensor_close(a, b)


def test_traced_by_fx_as_a_leaf() -> None:
    model = convert_sync_batchnorm(nn.Sequential(made(BySuper), made(ByFunction)))
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", [BySuper, ByFunction])
def test_exported(kind) -> None:
    layer, x = convert_sync_batchnorm(made(kind)), torch.randn(SHAPE, dtype=torch.float64)
    program = torch.export.export(layer.eval(), (x,))
    assert_tensor_close(program.module()(x), layer(x))
    traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(x), layer(x))
    trained = torch.export.export(layer.train(), (x,))  # alone
    assert_tensor_close(trained.module()(x), layer(x))
    with pytest.raises(ConversionError, match="an exported program has no replicas"):
        torch.export.export(convert_sync_batchnorm(made(kind), Unreachable()), (x,))


@pytest.mark.parametrize("kind", [BySuper, ByFunction])
def test_one_collective_each_way(kind) -> None:
    comm = Recording(SingleProcess())
    layer = convert_sync_batchnorm(made(kind), comm)
    x = torch.randn(SHAPE, dtype=torch.float64)
    step(layer, x, x)
    layer.eval()(x)
    assert comm.calls == [(7, torch.float64), (6, torch.float64)]


@pytest.mark.parametrize("kind", [BySuper, ByFunction, ByName])
def test_in_a_block_of_layers_that_wait(kind) -> None:
    """It does not wait: it uses the output itself."""
    x = torch.randn(SHAPE, dtype=torch.float64)
    layer, first = convert_sync_batchnorm(made(kind)), SyncBatchNorm(3).double()
    expected = copy.deepcopy(layer)(copy.deepcopy(first)(x))
    with together():
        y = layer(first(x))
    assert_tensor_close(y, expected)


def test_second_derivatives() -> None:
    layer = convert_sync_batchnorm(made(ByFunction))
    x = torch.randn(4, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    layer.momentum = 0.0
    assert torch.autograd.gradgradcheck(layer, x)


@every_kind
def test_convert_and_revert_is_the_identity(kind) -> None:
    model = nn.Sequential(made(kind))
    before = snapshot(model)
    assert isinstance(convert_sync_batchnorm(model, "node")[0], SyncBatchNorm)
    assert snapshot(revert_sync_batchnorm(model)) == before


@every_kind
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(kind, copied) -> None:
    layer = convert_sync_batchnorm(made(kind))
    other = copied(layer)
    assert type(other) is type(layer)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert type(revert_sync_batchnorm(other)) is kind


def test_an_input_that_is_no_tensor() -> None:
    layer = convert_sync_batchnorm(made(Wrapped))
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert_tensor_close(layer(Wrapped.Values(x)).values, made(Wrapped)(x))


def test_attributes_that_are_called_as_ours_stay_the_layers_own() -> None:
    layer = convert_sync_batchnorm(made(WithNamesOfOurs), "node")
    assert isinstance(layer.activation, nn.Tanh)
    layer.activation = nn.ReLU()  # a child, as it was
    assert layer._modules["activation"] is layer.activation
    assert layer.process_group == "a string"
    assert "process_group='node'" in repr(layer)
    plain = nn.BatchNorm2d(3)
    plain.activation = "anything"
    assert convert_sync_batchnorm(plain).activation == "anything"
    assert isinstance(plain(torch.randn(SHAPE)), Tensor)


def test_another_norm_layer_within_may_be_left_out() -> None:
    layer = made(WithAnotherNorm)
    batch = random_batch([SHAPE] * 2)

    def replica(comm: Any) -> tuple[Tensor, nn.Module]:
        ours = convert_sync_batchnorm(copy.deepcopy(layer), comm, skip="other")
        return ours(batch.xs[comm.rank]), ours

    inner = copy.deepcopy(layer)
    inner.other = nn.Identity()
    expected = inner(torch.cat(batch.xs)).split(2)
    for (y, ours), before in zip(run_threads(2, replica), expected, strict=True):
        assert type(ours.other) is nn.BatchNorm2d
        assert_tensor_close(y, copy.deepcopy(layer.other)(before))


class Frozen(nn.BatchNorm2d):
    """Uses its running statistics in training as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def test_a_layer_that_uses_its_running_statistics_needs_no_peer() -> None:
    layer, x = made(Frozen), torch.randn(SHAPE, dtype=torch.float64)
    expected = layer(x)
    assert torch.equal(convert_sync_batchnorm(layer, Unreachable())(x), expected)


class Nothing(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_normalises_nothing(compiled) -> None:
    torch._dynamo.reset()
    layer = convert_sync_batchnorm(Nothing(3), Unreachable())
    run = torch.compile(layer, backend="eager") if compiled else layer
    with pytest.raises(ConversionError, match=r"the forward of Nothing called neither .*skip=.*syncbn.SyncBatchNorm"):
        run(torch.randn(SHAPE))
    layer.eval()(torch.randn(SHAPE))


def test_its_activation_is_its_own_affair() -> None:
    with pytest.raises(ConversionError, match="SyncBySuper has a forward of its own: apply the activation there"):
        convert_sync_batchnorm(BySuper(3)).activation = "relu"


# timm's BatchNormAct2d


def activated(act: Any = nn.ReLU, **options: Any) -> Any:
    timm = vision.load("timm")
    return randomized(timm.layers.BatchNormAct2d(3, act_layer=act, **options)).double()


ACTS = {"relu": nn.ReLU, "leaky_relu(0.01)": nn.LeakyReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "None": nn.GELU}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ACTS)
def test_timms_layer(name, fused) -> None:
    def run(layer: Any) -> Any:
        if fused and layer.activation is None:
            fuse_activations(layer)
            assert str(layer.activation) == name
        return layer

    assert_as_whole_batch(lambda: activated(ACTS[name]), run)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_timms_layer_goes_by_its_act_and_drop(act) -> None:
    layer, x = activated(act), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    other = copy.deepcopy(layer)
    fuse_activations(convert_sync_batchnorm(layer))
    for change in ({"act": nn.SiLU()}, {"act": nn.Identity()}, {"drop": nn.Flatten()}):
        revert_sync_batchnorm(layer)
        for name, module in change.items():
            setattr(layer, name, module)
            setattr(other, name, module)
        assert_tensor_close(convert_sync_batchnorm(layer)(x), other(x))


NOT_FUSED = {
    "act": lambda layer: setattr(layer, "act", nn.GELU()),
    "drop": lambda layer: setattr(layer, "drop", nn.Dropout(0.0)),
    "hook": lambda layer: layer.act.register_forward_hook(lambda *_: None),
    "hook on drop": lambda layer: layer.drop.register_forward_hook(lambda *_: None),
    "forward": lambda layer: setattr(layer.act, "forward", torch.relu),
    "class": lambda layer: setattr(
        layer,
        "__class__",
        type("Own", (type(layer),), {"forward": lambda self, x: type(self).__base__.forward(self, x)}),
    ),
}


@pytest.mark.parametrize("change", NOT_FUSED.values(), ids=NOT_FUSED)
def test_timms_layer_is_not_fused_where_that_would_change_something(change) -> None:
    layer = activated()
    change(layer)
    before = snapshot(layer)
    assert fuse_activations(convert_sync_batchnorm(layer)) == []
    assert snapshot(revert_sync_batchnorm(layer)) == before


def test_timms_layer_is_not_fused_with_what_follows() -> None:
    model = convert_sync_batchnorm(nn.Sequential(activated(apply_act=False), nn.ReLU()))
    assert fuse_activations(model) == []


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_layer_of_timms_activates_once(training) -> None:
    layer = convert_sync_batchnorm(activated(nn.SiLU))
    fuse_activations(layer)
    layer.train(training)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    program = torch.export.export(layer, (x,))
    assert_tensor_close(program.module()(x), layer(x))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_timms_layer(copied) -> None:
    layer = convert_sync_batchnorm(activated(nn.SiLU))
    fuse_activations(layer)
    other = copied(layer)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    plain = revert_sync_batchnorm(other)
    assert (type(plain), type(plain.act)) == (type(activated()), nn.SiLU)
    assert str(layer.activation) == "silu"


def test_a_parametrized_layer_of_timms() -> None:
    layer = activated()
    layer.__class__ = type("Own", (type(layer),), {"extra": 1})
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x)
    assert_tensor_close(convert_sync_batchnorm(layer)(x), expected)


def test_a_model_of_timms() -> None:
    timm = vision.load("timm")
    torch.manual_seed(0)
    whole = timm.create_model("mobilenetv3_small_050", pretrained=False, drop_rate=0.0, num_classes=4).double()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomized(module)
    models = [copy.deepcopy(whole) for _ in range(2)]
    original = snapshot(models[0])
    batch = random_batch([(2, 3, 32, 32)] * 2)
    g = torch.randn(4, 4, dtype=torch.float64)
    x = torch.cat(batch.xs).requires_grad_()
    y = whole(x)
    (y * g).sum().backward()

    def replica(comm: Any) -> tuple[Tensor, Tensor | None]:
        model = convert_sync_batchnorm(models[comm.rank], comm)
        fuse_activations(model)
        return step(model, batch.xs[comm.rank], g[2 * comm.rank : 2 * comm.rank + 2])

    ys, dxs = zip(*run_threads(2, replica), strict=True)
    assert_tensor_close(torch.cat(ys), y, 100)
    assert_tensor_close(torch.cat(dxs), x.grad, 100)
    for key, parameter in whole.named_parameters():
        total = sum(model.get_parameter(key).grad for model in models)
        assert_tensor_close(total, parameter.grad, 1000, key)
    for key, buffer in whole.named_buffers():
        assert_tensor_close(models[0].get_buffer(key), buffer, 100, key)
    norms = [module for module in models[0].modules() if isinstance(module, _BatchNorm)]
    assert {str(norm.activation) for norm in norms} == {"hardswish", "relu", "None"}
    assert snapshot(revert_sync_batchnorm(models[0])) == original
