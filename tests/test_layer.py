"""The module: nn.BatchNorm in everything but the statistics."""

import copy
import io
import pickle

import pytest
import torch
from reference import (
    FLOATS,
    WITHOUT_BIAS,
    Recording,
    Unreachable,
    assert_close,
    random_batch,
    randomized,
    replicas,
    step,
    whole_batch,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import syncbn
from syncbn import SyncBatchNorm
from syncbn.comm import run_threads
from syncbn.errors import DTypeError, GroupError, InputError

OPTIONS = [{}, {"affine": False}, WITHOUT_BIAS, {"track_running_stats": False}, {"momentum": None}]


def trained(layer):
    """Give a layer parameters and buffers that are not the initial ones."""
    randomized(layer)
    layer(torch.randn(8, layer.num_features, generator=torch.Generator().manual_seed(2)).to(layer_dtype(layer)))
    return layer


def layer_dtype(layer):
    return next((t.dtype for t in layer.state_dict().values() if t.is_floating_point()), torch.float32)


def assert_same_state(layer, state):
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def saved_and_loaded(x, *, weights_only=False):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# Running statistics


@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])
@pytest.mark.parametrize("world", [1, 3])
def test_momentum(world, momentum):
    batches = [random_batch([(3, 2, 4)] * world, mean=seed, seed=seed) for seed in range(3)]
    assert_close(replicas(*batches, momentum=momentum), whole_batch(*batches, momentum=momentum), factor=5)


def test_forward_without_grad_moves_the_statistics_too():
    layer = SyncBatchNorm(3)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.any()


def test_statistics_frozen_by_the_flag_stay():
    """As in nn.BatchNorm: buffers that are there but not tracked."""
    layers = [trained(cls(3)) for cls in (SyncBatchNorm, nn.BatchNorm1d)]
    for layer in layers:
        layer.track_running_stats = False
        before = copy.deepcopy(layer.state_dict())
        layer(torch.randn(4, 3))
        assert_same_state(layer, before)
    x = torch.randn(4, 3)
    ours, theirs = [layer.eval()(x) for layer in layers]
    torch.testing.assert_close(ours, theirs)


def test_reset():
    layer = trained(SyncBatchNorm(3))
    layer.reset_parameters()
    assert_same_state(layer, nn.BatchNorm1d(3).state_dict())


# Eval


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 4), (2, 3, 2, 3, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eval_is_nn_batch_norm_bit_for_bit(shape, options, dtype):
    theirs_class = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    ours = trained(SyncBatchNorm(3, process_group=Unreachable(), dtype=dtype, **options).eval())
    theirs = theirs_class(3, dtype=dtype, **options).eval()
    if options.get("track_running_stats", True):
        ours.running_mean.uniform_(-1, 1)
        ours.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for a, b in zip(step(ours, x, g), step(theirs, x, g), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_eval_leaves_the_statistics_alone():
    layer = trained(SyncBatchNorm(3)).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, 3))
    assert_same_state(layer, before)


# state_dict


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_is_that_of_nn_batch_norm(options):
    ours, theirs = trained(SyncBatchNorm(3, **options)), trained(nn.BatchNorm1d(3, **options))
    for source, target in [(ours, nn.BatchNorm1d(3, **options)), (theirs, SyncBatchNorm(3, **options))]:
        target.load_state_dict(source.state_dict(), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)


def test_old_checkpoints_without_num_batches_tracked():
    state = trained(SyncBatchNorm(3)).state_dict()
    old = {key: value for key, value in state.items() if key != "num_batches_tracked"}
    layer = SyncBatchNorm(3)
    layer.load_state_dict(old, strict=True)
    assert torch.equal(layer.running_mean, state["running_mean"])
    assert layer.num_batches_tracked == 0


# Copies


def test_a_deep_copy_shares_the_group_and_nothing_else():
    def replica(comm):
        layer = SyncBatchNorm(2, process_group=comm)
        copied = copy.deepcopy(layer)
        copied(torch.full((3, 2), float(comm.rank)))
        assert copied.process_group is layer.process_group
        assert not layer.running_mean.any()
        return copied.running_mean[0].item()

    assert run_threads(2, replica) == pytest.approx([0.05, 0.05])


def test_a_copy_can_get_another_group():
    layer = SyncBatchNorm(2, process_group="world")
    copied = copy.deepcopy(layer)
    copied.process_group = "node"
    assert layer.process_group == "world"


@pytest.mark.parametrize("group", [None, "world", "node", 4])
def test_a_saved_model_keeps_a_group_that_means_the_same_elsewhere(group):
    model = nn.Sequential(nn.Linear(2, 3), trained(SyncBatchNorm(3, process_group=group)))
    loaded = saved_and_loaded(model)
    assert loaded[1].process_group == group
    x = torch.randn(4, 2)
    assert torch.equal(loaded(x), model(x))


def test_a_saved_handle_is_an_error_when_it_is_used_not_another_group():
    (layer,) = run_threads(1, lambda comm: saved_and_loaded(SyncBatchNorm(3, process_group=comm)))
    x = torch.randn(4, 3)
    layer.eval()(x)
    layer.train()
    with pytest.raises(GroupError, match=r"ThreadReplica.*set layer.process_group"):
        layer(x)
    assert layer.num_batches_tracked == 0
    layer.process_group = None
    layer(x)


def test_a_state_dict_loads_with_weights_only():
    state = SyncBatchNorm(3, process_group="world").state_dict()
    assert list(saved_and_loaded(state, weights_only=True)) == list(state)


def test_pickle_knows_nothing_of_the_communicator():
    assert b"Unreachable" not in pickle.dumps(SyncBatchNorm(3, process_group=None))
    pickle.dumps(SyncBatchNorm(3, process_group=Recording(syncbn.world())))


def test_an_averaged_model_evaluates_and_trains_with_the_group():
    def replica(comm):
        model = nn.Sequential(nn.Linear(2, 3), SyncBatchNorm(3, process_group=comm))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        for _ in range(2):
            model(torch.randn(4, 2))
            average.update_parameters(model)
        average.eval()(torch.randn(1, 2))
        average.train()(torch.randn(4, 2))
        return average.module[1]

    for layer in run_threads(2, replica):
        assert isinstance(layer, SyncBatchNorm)
        assert layer.process_group.size == 2


# Bad input: refused before any collective, with the layer as it was

BAD_INPUT = {
    "1D": (torch.ones(3), InputError, r"2D or more input, got 1D of shape \(3,\)"),
    "scalar": (torch.tensor(1.0), InputError, "2D or more input, got 0D"),
    "channels": (torch.ones(2, 4, 5), InputError, r"shape \(4,\) for input of shape \(2, 4, 5\), got \(3,\)"),
    "channels last": (torch.ones(2, 5, 5, 3), InputError, r"shape \(5,\) for input of shape \(2, 5, 5, 3\)"),
    "no channels": (torch.ones(2, 0), InputError, "at least 1 channel"),
    "integer": (torch.ones(2, 3, dtype=torch.int64), DTypeError, r"floating-point input, got torch.int64"),
    "complex": (torch.ones(2, 3, dtype=torch.complex64), DTypeError, "floating-point input, got torch.complex64"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(x, error, message, training):
    layer = SyncBatchNorm(3, process_group=Unreachable()).train(training)
    with pytest.raises(error, match=message):
        layer(x)
    assert layer.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_input():
    x = torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.quint8)
    with pytest.raises(DTypeError, match=r"floating-point input, got torch.quint8: pass input.dequantize\(\)"):
        SyncBatchNorm(3, process_group=Unreachable())(x)


@pytest.mark.parametrize("training", [True, False])
def test_without_state_the_layer_knows_its_channels(training):
    layer = SyncBatchNorm(3, affine=False, track_running_stats=False, process_group=Unreachable()).train(training)
    with pytest.raises(InputError, match=r"expected 3 channels, got 4 in input of shape \(2, 4\)"):
        layer(torch.ones(2, 4))


def test_errors_are_those_of_python_too():
    """Caught by code that was written for nn.BatchNorm."""
    assert issubclass(InputError, ValueError)
    assert issubclass(DTypeError, TypeError)
    assert issubclass(InputError, syncbn.errors.SyncBatchNormError)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("value", "error"), [(torch.ones(4), InputError), (torch.ones(3, 1), InputError), (torch.ones(3).int(), DTypeError)]
)
def test_bad_tensors_per_channel(name, value, error, training):
    with pytest.raises(error, match=name):
        syncbn.functional.sync_batch_norm(
            torch.ones(2, 3), training=training, process_group=Unreachable(), **{name: value}
        )


def test_zero_channels():
    with pytest.raises(InputError, match="at least 1 channel"):
        SyncBatchNorm(0)
    with pytest.raises(InputError, match=r"at least 1 channel.*\(2, 0\)"):
        syncbn.functional.sync_batch_norm(torch.ones(2, 0), process_group=Unreachable())


def test_a_failed_collective_leaves_the_layer_as_it_was():
    layer = SyncBatchNorm(3, process_group=Unreachable())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(AssertionError, match="a collective of 10 numbers"):
        layer(torch.randn(2, 3))
    assert_same_state(layer, before)


def test_the_group_is_named():
    assert repr(SyncBatchNorm(3, process_group="node")).endswith("process_group='node')")
    assert "process_group" not in repr(SyncBatchNorm(3))


def test_device_and_dtype_are_those_of_nn_batch_norm():
    layer = SyncBatchNorm(3, device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer.running_mean.dtype == layer.weight.dtype == torch.bfloat16
    assert layer.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("affine", [True, False])
def test_pruned_channels(affine):
    """Parameters and buffers are cut, `num_features` is stale: nn.BatchNorm goes by the tensors."""
    ours, theirs = [trained(cls(5, affine=affine)) for cls in (SyncBatchNorm, nn.BatchNorm1d)]
    kept = torch.tensor([0, 2, 3])
    for layer in (ours, theirs):
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.dim():
                tensor.data = tensor.data[kept]
    x = torch.randn(4, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SyncBatchNorm(3),
        lambda: type("Own", (SyncBatchNorm,), {})(3),
        lambda: syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(3)),
        lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3)),
        lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm3d(3)),
    ],
    ids=["made", "derived", "from nn.SyncBatchNorm", "from 1d", "from 3d"],
)
def test_the_usual_filters_find_the_layer(make):
    """Trainers take weight decay off by these classes; DDP refuses the last of them on a CPU."""
    layer = make()
    found = [c for c in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm) if isinstance(layer, c)]
    assert len(found) == 1
    assert found[0] is not nn.SyncBatchNorm
    assert isinstance(layer, SyncBatchNorm)
    assert issubclass(type(layer), SyncBatchNorm)
    assert not isinstance(nn.BatchNorm2d(3), SyncBatchNorm)


def test_the_default_device_does_not_matter():
    x = torch.randn(4, 3, requires_grad=True)
    layer, expected = SyncBatchNorm(3), nn.BatchNorm1d(3)
    torch.set_default_device("meta")
    try:
        y = layer(x)
        y.square().sum().backward()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(y, expected(x))
    torch.testing.assert_close(layer.running_var, expected.running_var)


class Labelled(torch.Tensor):
    """A subclass that leaves the work to torch."""


@pytest.mark.parametrize("training", [True, False])
def test_a_subclass_of_tensor_comes_out_as_from_nn_batch_norm(training):
    x = torch.randn(4, 3).as_subclass(Labelled)
    ours, theirs = [cls(3).train(training)(x) for cls in (SyncBatchNorm, nn.BatchNorm1d)]
    assert type(ours) is type(theirs) is Labelled
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


def negative(x):
    """A view that reads its memory with the other sign."""
    view = torch.complex(torch.zeros_like(x), x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("which", ["input", "weight", "bias", "gradient"])
def test_a_negative_view(which):
    x, dy = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    weight, bias = torch.rand(2, 3, dtype=torch.float64) + 0.5
    arguments = {"input": x, "weight": weight, "bias": bias, "gradient": dy}
    outcomes = []
    for change in (negative, torch.neg):
        given = {**arguments, which: change(arguments[which])}
        leaf = given["input"].detach().requires_grad_()
        y = syncbn.functional.sync_batch_norm(leaf, None, None, given["weight"], given["bias"])
        outcomes.append([y, *torch.autograd.grad(y, leaf, given["gradient"])])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["input", "weight", "running_mean"])
@pytest.mark.parametrize("training", [True, False])
def test_a_tensor_whose_values_are_elsewhere_is_refused(which, training):
    """A DTensor has no memory of its own to be read."""
    from torch.testing._internal.two_tensor import TwoTensor

    arguments = {"input": torch.randn(4, 3), "weight": torch.ones(3), "running_mean": torch.zeros(3)}
    arguments[which] = TwoTensor(arguments[which], arguments[which])
    with pytest.raises(DTypeError, match=rf"ordinary tensor as {which}, got a TwoTensor.*DTensor.to_local"):
        syncbn.functional.sync_batch_norm(**arguments, training=training, process_group=Unreachable())


def test_the_defaults_of_the_function_are_those_of_torch():
    x, ours, theirs = torch.randn(8, 3), [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    y = syncbn.functional.sync_batch_norm(x, *ours)
    torch.testing.assert_close(y, nn.functional.batch_norm(x, *theirs, training=True))
    torch.testing.assert_close(ours, theirs)
