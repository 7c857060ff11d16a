"""Conversion: another class for the same object, and back."""

import copy

import pytest
import torch
from modules import COPIES, snapshot
from reference import WITHOUT_BIAS, Recording, Unreachable, assert_tensor_close, on_rows, random_batch, randomized
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import ConversionError, GroupError

KINDS = {nn.BatchNorm1d: (4, 3), nn.BatchNorm2d: (2, 3, 4, 4), nn.BatchNorm3d: (2, 3, 2, 3, 4)}


class Described(nn.BatchNorm2d):
    """A subclass that adds state and methods, but no forward."""

    def __init__(self, channels, note="mine"):
        super().__init__(channels)
        self.note = note

    def extra_repr(self):
        return f"{super().extra_repr()}, note={self.note}"


class Exponential(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return x.exp()


def tree():
    """A model with norm layers at every depth, one of them shared by two parents under two names."""
    shared = nn.BatchNorm2d(4)
    block = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": shared})
    return nn.ModuleList([nn.BatchNorm1d(2), nn.ModuleList([block, nn.Sequential(nn.BatchNorm3d(5))]), shared])


def norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


# What is converted


@pytest.mark.parametrize(("kind", "shape"), KINDS.items())
def test_a_converted_layer_synchronises(kind, shape):
    batch = random_batch([shape] * 2, mean=2)
    whole = randomized(nn.BatchNorm1d(3)).double()
    expected = on_rows(whole, batch.xs)

    def replica(comm):
        layer = convert_sync_batchnorm(randomized(kind(3)).double(), process_group=comm)
        return layer(batch.xs[comm.rank]), layer.running_var

    for rank, (y, var) in enumerate(run_threads(2, replica)):
        assert_tensor_close(y, expected[rank])
        assert_tensor_close(var, whole.running_var)


def test_without_conversion_it_does_not():
    """Negative control of the test above."""
    batch = random_batch([(4, 3)] * 2)
    expected = on_rows(nn.BatchNorm1d(3).double(), batch.xs)
    with pytest.raises(AssertionError):
        assert_tensor_close(nn.BatchNorm1d(3).double()(batch.xs[0]), expected[0])


def test_every_norm_layer_of_a_tree():
    model = tree()
    assert convert_sync_batchnorm(model) is model
    assert len(norms(model)) == 3
    assert all(isinstance(layer, SyncBatchNorm) for layer in norms(model))
    assert model[2] is model[1][0]["norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_itself(kind):
    layer = kind(3)
    assert convert_sync_batchnorm(layer) is layer
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, kind)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert type(layer).__name__ == f"Sync{kind.__name__}"


@pytest.mark.parametrize(
    "module", [nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.GroupNorm(1, 3), nn.LayerNorm(3)]
)
def test_other_norms_are_not_touched(module):
    before = snapshot(module)
    convert_sync_batchnorm(module)
    assert snapshot(module) == before


@pytest.mark.parametrize(("kind", "shape"), KINDS.items())
def test_dimension_checks_stay(kind, shape):
    layer = convert_sync_batchnorm(kind(3), process_group=Unreachable())
    with pytest.raises(ValueError, match="expected"):
        layer(torch.ones(*shape, 1, 1))


def test_one_class_for_each_original():
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(3))) is type(convert_sync_batchnorm(nn.BatchNorm2d(4)))


def test_a_subclass_without_forward_keeps_what_it_adds():
    layer = convert_sync_batchnorm(Described(3, note="kept"))
    assert isinstance(layer, Described)
    assert "note=kept" in repr(layer)


# What is refused


class Foreign(nn.SyncBatchNorm):
    def forward(self, x):
        return x


def replaced():
    layer = nn.BatchNorm2d(3)
    original = layer.forward
    layer.forward = lambda x: original(x).relu()  # as accelerate's hooks do
    return layer


def wrapped():
    """A model in FSDP, without a process group."""
    kind = type("FullyShardedDataParallel", (nn.Module,), {})
    wrapper = kind()
    wrapper.module = nn.BatchNorm2d(3)
    return wrapper


class SyncBN(nn.SyncBatchNorm):
    """As mmengine's."""

    def _check_input_dim(self, input):
        super()._check_input_dim(input)


@pytest.mark.parametrize("training", [True, False])
def test_subclass_of_torchs_synchronised_layer_that_only_checks_dimensions(training):
    layer = convert_sync_batchnorm(SyncBN(3).train(training))
    x = torch.randn(4, 3)
    assert_tensor_close(layer(x), nn.BatchNorm1d(3).train(training)(x))
    with pytest.raises(ValueError, match="expected 2D or more"):
        layer(x[0])
    assert type(revert_sync_batchnorm(layer)) is SyncBN


REFUSED = {
    "subclass": (lambda: Foreign(3), r"1: .*Foreign: it derives from nn.SyncBatchNorm, .* its `forward` would be lost"),
    "replaced": (replaced, r"1: .*BatchNorm2d: its forward was replaced on the object itself"),
    "lazy": (nn.LazyBatchNorm2d, r"1: .*LazyBatchNorm2d: it has no shape yet: run one batch"),
    "wrapped": (wrapped, r"1: FullyShardedDataParallel has taken the parameters apart"),
}


@pytest.mark.parametrize(("bad", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_reason_and_nothing_changed(bad, message):
    model = nn.Sequential(nn.BatchNorm2d(3), bad(), nn.BatchNorm2d(3))
    before = snapshot(model)
    with pytest.raises(ConversionError, match=message):
        convert_sync_batchnorm(model)
    assert snapshot(model) == before
    assert list(convert_sync_batchnorm(model, dry_run=True).refused) == ["1"]
    convert_sync_batchnorm(model, skip="1")
    assert [isinstance(m, SyncBatchNorm) for m in model] == [True, False, True]


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
def test_lazy_layers_are_refused_until_they_have_a_shape(lazy):
    model = nn.Sequential(nn.BatchNorm2d(3), lazy())
    with pytest.raises(ConversionError, match=r"no shape yet: run one batch"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    model[1](torch.ones([2, 3, 4, 4, 4][: {"1": 2, "2": 4, "3": 5}[lazy.__name__[-2]]]))
    assert isinstance(convert_sync_batchnorm(model)[1], SyncBatchNorm)


def test_an_unknown_group_is_refused_and_nothing_changed():
    model = tree()
    before = snapshot(model)
    with pytest.raises(GroupError, match="unknown process group 'nodes'"):
        convert_sync_batchnorm(model, process_group="nodes")
    assert snapshot(model) == before


# What stays


def test_the_layer_keeps_its_parameters_buffers_flags_and_hooks():
    layer = nn.BatchNorm2d(3, eps=0.1, momentum=None, dtype=torch.float64).eval()
    layer.weight.requires_grad = False
    layer.qconfig = "kept"
    tensors = layer.state_dict(keep_vars=True)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    convert_sync_batchnorm(layer)
    assert all(tensors[key] is value for key, value in layer.state_dict(keep_vars=True).items())
    assert (layer.eps, layer.momentum, layer.training, layer.qconfig) == (0.1, None, False, "kept")
    assert not layer.weight.requires_grad
    layer(torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("options", [{"affine": False}, WITHOUT_BIAS, {"track_running_stats": False}], ids=str)
def test_options_stay(options):
    layer = nn.BatchNorm2d(3, **options)
    names = list(layer.state_dict())
    text = repr(layer)
    convert_sync_batchnorm(layer)
    assert list(layer.state_dict()) == names
    assert repr(layer) == f"Sync{text}"
    layer(torch.randn(2, 3, 4, 4))


def test_an_optimizer_made_before_still_updates_the_layer():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_sync_batchnorm(model)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, torch.ones(3))


def test_a_parametrized_layer_synchronises():
    def replica(comm):
        layer = nn.BatchNorm1d(2)
        parametrize.register_parametrization(layer, "weight", Exponential())
        recording = Recording(comm)
        y = convert_sync_batchnorm(layer, process_group=recording)(torch.full((2, 2), float(comm.rank)))
        assert torch.equal(layer.weight, torch.ones(2).exp())
        return recording.calls, y[0, 0].item()

    (calls, low), (_, high) = run_threads(2, replica)
    assert calls == [(5, torch.float64)]
    assert -low == high == pytest.approx(torch.e, rel=1e-4)


def test_a_parametrization_can_be_removed_from_a_converted_layer():
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Exponential())
    convert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer, SyncBatchNorm)
    layer(torch.randn(2, 3, 4, 4))


def test_a_layer_parametrized_after_conversion_is_not_reverted():
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    parametrize.register_parametrization(layer, "weight", Exponential())
    with pytest.raises(ConversionError, match="undo that first"):
        revert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(revert_sync_batchnorm(layer)) is nn.BatchNorm2d


# Groups


@pytest.mark.parametrize("group", [None, "world", "node", 2, SingleProcess()])
def test_the_group_reaches_every_layer(group):
    model = convert_sync_batchnorm(tree(), process_group=group)
    assert all(layer.process_group is group for layer in norms(model))


def test_converting_twice_is_converting_once():
    model = convert_sync_batchnorm(tree(), process_group="node")
    before = snapshot(model)
    convert_sync_batchnorm(model)
    assert snapshot(model) == before
    convert_sync_batchnorm(model, process_group="world")
    assert {layer.process_group for layer in norms(model)} == {"world"}


def test_torch_sync_batch_norm_becomes_ours_and_keeps_its_group():
    group = SingleProcess()
    layer = nn.SyncBatchNorm(3, process_group=group)
    convert_sync_batchnorm(layer)
    assert isinstance(layer, SyncBatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)  # DDP refuses it on a CPU
    assert layer.process_group is group
    layer(torch.randn(2, 3, 4, 4))
    revert_sync_batchnorm(convert_sync_batchnorm(layer, process_group="world"))
    assert type(layer) is nn.SyncBatchNorm
    assert layer.process_group is group


def test_a_layer_of_ours_is_left_as_it_is():
    layer = SyncBatchNorm(3)
    convert_sync_batchnorm(layer)
    revert_sync_batchnorm(layer)
    assert type(layer) is SyncBatchNorm


# And back


@pytest.mark.parametrize(
    "make", [tree, lambda: Described(3), lambda: nn.SyncBatchNorm(3)], ids=["tree", "sub", "torch"]
)
@pytest.mark.parametrize("group", [None, "node"])
def test_convert_and_revert_is_the_identity(make, group):
    model = make()
    before = snapshot(model)
    assert revert_sync_batchnorm(convert_sync_batchnorm(model, process_group=group)) is model
    assert snapshot(model) == before
    assert snapshot(revert_sync_batchnorm(model)) == before


def test_the_identity_test_sees_a_change():
    """Negative control."""
    model = tree()
    before = snapshot(model)
    assert snapshot(convert_sync_batchnorm(model)) != before
    model = tree()
    before = snapshot(model)
    model[0].momentum = 0.5
    assert snapshot(model) != before


def test_a_reverted_layer_evaluates_with_what_was_learned():
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    layer(torch.randn(2, 3, 4, 4))
    layer.eval()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x), revert_sync_batchnorm(layer)(x))


# Copies of converted layers


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "make", [tree, lambda: Described(3), lambda: nn.SyncBatchNorm(3)], ids=["tree", "sub", "torch"]
)
def test_copies_are_converted_and_revert(make, copied):
    model = convert_sync_batchnorm(make(), process_group="world")
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert all(layer.process_group == "world" for layer in norms(other))
    assert [type(m) for m in revert_sync_batchnorm(other).modules()] == [type(m) for m in make().modules()]
    assert all(isinstance(layer, SyncBatchNorm) for layer in norms(model))


def test_a_copy_of_a_parametrized_layer():
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Exponential())
    copied = copy.deepcopy(convert_sync_batchnorm(layer))
    assert type(copied) is type(layer)
    assert torch.equal(copied.weight, layer.weight)


def test_the_class_method_of_torchs_layer():
    model = tree()
    assert SyncBatchNorm.convert_sync_batchnorm(model, "node") is model
    assert {layer.process_group for layer in norms(model)} == {"node"}
