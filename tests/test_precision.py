"""Half precision, autocast, mixed dtypes, memory formats; as accurate as nn.BatchNorm on the whole batch."""

import itertools

import pytest
import torch
from reference import (
    FLOATS,
    Batch,
    assert_close,
    assert_tensor_close,
    random_batch,
    randomized,
    replicas,
    step,
    to_rows,
    whole_batch,
)
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.comm import run_threads

HALVES = [torch.float16, torch.bfloat16]


def root_mean_square(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).square().mean().sqrt().item()


def errors(actual, expected):
    """The error of each field of an `Outcome`, over all its tensors."""
    return {
        name: root_mean_square([a.double() - e for a, e in zip(found, getattr(expected, name), strict=True)])
        for name, found in actual._asdict().items()
        if name != "num_batches_tracked"
    }


def whole_in(dtype, batch):
    """What nn.BatchNorm makes of the whole batch in `dtype` itself: a world of one replica, without our code."""
    layer = randomized(nn.BatchNorm1d(batch.xs[0].shape[1], dtype=dtype))
    y, dx = step(layer, torch.cat([to_rows(x) for x in batch.xs]), torch.cat([to_rows(g) for g in batch.gs]))
    return [y], [dx], [layer.weight.grad], [layer.bias.grad], [layer.running_mean], [layer.running_var]


def as_rows(outcome):
    """Let y and dx be one tensor each, as in `whole_in`."""
    return outcome._replace(**{
        name: [torch.cat([to_rows(part) for part in getattr(outcome, name)])] for name in ("y", "dx")
    })  # fmt: skip


@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("world", [1, 4])
def test_at_most_twice_the_error_of_nn_batch_norm(world, dtype, mean):
    batch = random_batch([(16, 8, 5, 5)] * world, dtype, mean=mean)
    expected = as_rows(whole_batch(batch, dtype=dtype))
    theirs = expected._replace(**dict(zip(expected._fields[:-1], whole_in(dtype, batch), strict=True)))
    ours = as_rows(replicas(batch, dtype=dtype))
    allowed = errors(theirs, expected)
    rounding = torch.finfo(dtype).eps / 4  # where torch is exact
    for name, error in errors(ours, expected).items():
        assert error <= 2 * allowed[name] + rounding * root_mean_square(getattr(expected, name)), name


# Half precision


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 parameters", "pure"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_input(dtype, parameters):
    batch = random_batch([(4, 3, 5, 5)] * 3, dtype, mean=2)
    ours = replicas(batch, dtype=parameters or dtype)
    assert {tensor.dtype for tensor in ours.y + ours.dx} == {dtype}
    assert_close(ours, whole_batch(batch, dtype=parameters or dtype), factor=2)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_converted_module(convert):
    def replica(comm):
        layer = getattr(SyncBatchNorm(3, process_group=comm), convert)()
        y = layer(torch.randn(4, 3).to(layer.weight.dtype))
        return y.dtype == layer.running_var.dtype == layer.weight.dtype

    assert all(run_threads(2, replica))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, training):
    """Behind a convolution the input is in the low dtype; the layer takes it and keeps it, as nn.BatchNorm2d does."""
    (x,), _ = random_batch([(4, 2, 6, 6)], torch.float32)
    conv = nn.Conv2d(2, 3, 3)
    with torch.autocast("cpu", dtype=dtype):
        h = conv(x).detach()
        theirs = randomized(nn.BatchNorm2d(3)).train(training)(h)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm)).train(training)
        part = h[2 * comm.rank : 2 * comm.rank + 2].requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = layer(part)
        y.sum().backward()
        return y.detach(), part.grad.dtype, layer.weight.grad.dtype

    ys, dx_dtypes, dw_dtypes = zip(*run_threads(2, replica), strict=True)
    assert ys[0].dtype == theirs.dtype == dtype
    assert set(dx_dtypes) == {dtype}
    assert set(dw_dtypes) == {torch.float32}
    assert_tensor_close(torch.cat(ys), theirs, factor=2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, repeat=3)), ids=str)
def test_any_mixture_of_dtypes(dtypes, training):
    """Input, parameters and buffers each have their own; y and dx have the input's."""
    of_input, of_parameters, of_buffers = dtypes
    (x,), (g,) = random_batch([(16, 3)], of_input)
    layer = randomized(SyncBatchNorm(3, dtype=of_parameters)).train(training)
    reference = randomized(nn.BatchNorm1d(3, dtype=of_parameters)).double().train(training)
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name).to(of_buffers))
    (y, dx), (reference_y, reference_dx) = step(layer, x, g), step(reference, x.double(), g.double())
    assert y.dtype == dx.dtype == of_input
    assert layer.weight.grad.dtype == of_parameters
    assert layer.running_var.dtype == of_buffers
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    for ours, theirs in [(y, reference_y), (dx, reference_dx), (layer.running_var, reference.running_var)]:
        torch.testing.assert_close(ours.double(), theirs, rtol=4 * coarsest, atol=8 * coarsest)


def test_replicas_of_different_dtypes():
    xs, gs = random_batch([(8, 3)] * 4)
    mixed = Batch(
        [x.to(d) for x, d in zip(xs, FLOATS, strict=True)], [g.to(d) for g, d in zip(gs, FLOATS, strict=True)]
    )
    ours = replicas(mixed, dtype=torch.float32)
    assert [y.dtype for y in ours.y] == [dx.dtype for dx in ours.dx] == FLOATS
    for of_float64 in (ours.y, ours.dx):
        of_float64[0] = of_float64[0].float()  # no better than the peers' sums
    assert_close(ours, whole_batch(mixed, dtype=torch.float32))


# Memory formats

FORMATS = {
    torch.channels_last: (2, 3, 4, 5),
    torch.channels_last_3d: (2, 3, 2, 4, 5),
    torch.contiguous_format: (2, 3, 4, 5),
}


@pytest.mark.parametrize("upstream", ["same", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("memory_format", "shape"), FORMATS.items(), ids=str)
def test_y_and_dx_keep_the_memory_format(memory_format, shape, dtype, upstream):
    def replica(comm):
        x = torch.randn(shape).to(dtype, memory_format=memory_format).requires_grad_()
        g = torch.randn(shape).to(dtype, memory_format=memory_format if upstream == "same" else torch.contiguous_format)
        y = SyncBatchNorm(3, process_group=comm)(x)
        (dx,) = torch.autograd.grad(y, x, g)
        return [t.is_contiguous(memory_format=memory_format) for t in (y, dx)]

    assert run_threads(2, replica) == [[True, True]] * 2


STRIDES = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "reversed channels": lambda x: x.flip(1).contiguous().flip(1),
    "one row": lambda x: x[:, :, :1],
    "one column": lambda x: x[:, :, :, 2:3],
    "one pixel": lambda x: x[:, :, 1:2, 1:2],
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded pixels": lambda x: x[:, :, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_strides(strided, dtype):
    """One replica has them, the other is contiguous; upstream gradients have them, too."""
    xs, gs = random_batch([(3, 4, 5, 6)] * 2, dtype)
    batch = Batch([strided(xs[0]), xs[1]], [strided(gs[0]), gs[1]])
    assert_close(replicas(batch, dtype=dtype), whole_batch(batch, dtype=dtype))
