"""Kernels against the formulas in float64: composed, and compiled for every instruction set; the compiled boundary."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import interpreter
import pytest
import torch
import torch.nn.functional as F
from reference import ACTIVATIONS
from torch import nn

from syncbn._epilogue import Epilogue, activation_of
from syncbn._plain import are_plain
from syncbn._statistics import Running, update_running
from syncbn.errors import InputError
from syncbn.kernels import _composed, _select, _triton, composed_only, kernels_for

compiled = pytest.importorskip(
    "syncbn.kernels._cpu", reason="syncbn was built without its compiled kernels", exc_type=ImportError
)
from syncbn import _native  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPUTE_EPS = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-24, torch.float16: 2**-24}
EPS = 1e-5

SHAPES = [
    (5, 1),
    (7, 3),
    (300, 33),
    (70, 8, 1),
    (3, 3, 7),  # planes too small for a vector
    (40, 3, 7),  # planes read as rows
    (2, 8, 67),
    (9, 33, 65),
    (2, 1, 4099),  # more than a block
    (3, 8, 5, 13),
    (2, 33, 9, 31),
    (33, 3, 16, 5),
    (2, 100, 3, 3),
    (2, 5, 8, 2),  # planes of whole vectors, few and not rows
    (2, 6, 7, 7),
    (1, 7, 8, 8),
    (2, 3, 2, 5, 9),
]


INTERPRETED = os.environ.get("SYNCBN_KERNELS") == "triton"  # see test_triton.py


@pytest.fixture(params=["triton"] if INTERPRETED else ["composed", *_native.instruction_sets()])
def kernels(request, monkeypatch):
    """Each set of kernels that works here."""
    if request.param == "composed":
        yield _composed
    elif request.param == "triton":
        interpreter.install(monkeypatch)
        yield _triton
    else:
        _native.use_instruction_set(request.param)
        yield compiled
        _native.use_instruction_set(_native.instruction_sets()[0])


@pytest.fixture(params=_native.instruction_sets())
def native(request):
    """The compiled kernels, for each instruction set."""
    _native.use_instruction_set(request.param)
    yield compiled
    _native.use_instruction_set(_native.instruction_sets()[0])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def contiguous(x):
    return x.clone(memory_format=torch.contiguous_format)


def channels_last(x):
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def sliced(x):
    """Every other value of a larger tensor."""
    larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    larger[..., ::2] = x
    return larger[..., ::2]


def sliced_channels_last(x):
    larger = x.new_full((x.shape[0], *x.shape[2:], 2 * x.shape[1]), torch.nan)
    larger[..., : x.shape[1]] = x.movedim(1, -1)
    return larger[..., : x.shape[1]].movedim(-1, 1)


def transposed(x):
    return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


LAYOUTS = [contiguous, channels_last, sliced, sliced_channels_last, transposed]


def random(shape, dtype, *, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def per_channel(values, x):
    return values.double().view(-1, *[1] * (x.dim() - 2))


def over_channel(x):
    """Sum all but the channels, in float64."""
    return x.double().sum([0, *range(2, x.dim())])


def total_of(x):
    """[Σx, Σx², n] in float64."""
    return packed(over_channel(x), over_channel(x.double().square()), x.numel() // x.shape[1])


def packed(first, second, n):
    return torch.cat([first, second, torch.tensor([n], dtype=torch.float64)])


def identity(channels):
    """The total of mean 0 and variance 1."""
    return packed(torch.zeros(channels).double(), torch.full((channels,), 2.0).double(), 2)


def normalize(kernels, x, total, weight=None, bias=None, eps=EPS):
    return kernels.normalize(x, total, Epilogue(weight, bias), eps, None)[0]


def backward_sums(kernels, dy, x, statistics):
    sums, dz = kernels.backward_sums(dy, x, statistics, Epilogue())
    assert dz is None
    return sums


def backward_input(kernels, dy, x, statistics, weight, sums):
    return kernels.backward_input(dy, x, statistics, Epilogue(weight), sums)


class Reference:
    """The four results in float64, by the formulas."""

    def __init__(self, x, dy, weight, bias, residual=None, activation=None):
        self.total = total_of(x)
        s1, s2, self.count = self.total.tensor_split([x.shape[1], 2 * x.shape[1]])
        self.mean = s1 / self.count
        self.invstd = ((s2 / self.count - self.mean.square()).clamp(min=0) + EPS).rsqrt()
        self.statistics = torch.cat([self.mean, self.invstd, self.count])
        x, dy = x.double(), dy.double()
        scale = self.invstd if weight is None else self.invstd * weight
        xhat = self.xhat = (x - per_channel(self.mean, x)) * per_channel(self.invstd, x)
        z = xhat * (1 if weight is None else per_channel(weight, x)) + (0 if bias is None else per_channel(bias, x))
        z = (z if residual is None else z + residual.double()).requires_grad_()
        y = z if activation is None else activation(z)
        self.y, (self.dz,) = y.detach(), torch.autograd.grad(y, z, dy)
        self.sums = torch.cat([over_channel(self.dz), over_channel(self.dz * xhat)])
        t1, t2 = (self.sums / self.count).chunk(2)
        self.dx = per_channel(scale, x) * (self.dz - per_channel(t1, x) - xhat * per_channel(t2, x))


def sums_within(kernels):
    """Units of the compute type: torch's own sums are a little less exact."""
    return 6 if kernels is _composed else 4


def assert_near(actual, expected, scale, ulps):
    """Equal within `ulps` units of the compute type, relative to `scale`, after rounding to the dtype of `actual`."""
    rounding = torch.finfo(actual.dtype).eps / 2 * expected.abs() if actual.dtype != torch.float64 else 0
    error = (actual.double() - expected).abs() - rounding
    assert (error <= ulps * scale).all(), f"{(error / scale).max():.3g} > {ulps}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formulas(kernels, shape, dtype):
    x, dy = random(shape, dtype, mean=0.5), random(shape, dtype, mean=-0.25, seed=1)
    weight, bias = random(shape[1], torch.float32, seed=2), random(shape[1], torch.float64, seed=3)
    of = Reference(x, dy, weight, bias)
    eps = COMPUTE_EPS[dtype]
    ulps = 16 if dtype == torch.float64 else sums_within(kernels)  # the reference is no better than what it judges
    size_of_moments = eps * torch.cat([over_channel(x.abs()), over_channel(x.double().square())])
    size_of_sums = eps * torch.cat([over_channel(dy.abs()), over_channel((dy * of.xhat).abs()) + 1])
    for layout in LAYOUTS:
        x, dy = layout(x), layout(dy)
        sums, count = kernels.moments(x).tensor_split([-1])
        assert sums.dtype == torch.float64
        assert torch.equal(count, of.count)
        assert_near(sums, of.total[:-1], size_of_moments, ulps)
        y = normalize(kernels, x, of.total, weight, bias)
        assert y.dtype == dtype
        assert_near(y, of.y, eps * (of.y.abs().max() + 1), ulps)
        sums = backward_sums(kernels, dy, x, of.statistics)
        assert_near(sums, of.sums, size_of_sums, ulps)
        dx = backward_input(kernels, dy, x, of.statistics, weight, of.sums)
        assert dx.dtype == dtype
        assert_near(dx, of.dx, eps * (of.dx.abs().max() + of.invstd.max()), ulps)


FUNCTIONS = [*ACTIVATIONS, nn.LeakyReLU(-2.0)]
EPILOGUES = [*((a, True) for a in (None, *FUNCTIONS)), *((a, False) for a in (nn.ReLU(), nn.SiLU()))]


@pytest.mark.parametrize(
    "shape", [(70, 33), (40, 3, 7), (2, 8, 67), (2, 6, 7, 7), (3, 3, 80, 91), (2, 3, 2, 5, 9)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "with_residual"), EPILOGUES, ids=str)
def test_formulas_with_activation_and_residual(kernels, shape, dtype, activation, with_residual):
    x, dy = random(shape, dtype, mean=0.5), random(shape, dtype, mean=-0.25, seed=1)
    weight, bias = random(shape[1], torch.float32, seed=2), random(shape[1], torch.float64, seed=3)
    residual = random(shape, dtype, seed=4) * 2 if with_residual else None
    of = Reference(x, dy, weight, bias, residual, activation)
    eps = COMPUTE_EPS[dtype]
    ulps = 32 if dtype == torch.float64 else 12
    for layout, layout_of_residual in (contiguous, transposed), (channels_last, contiguous), (sliced, channels_last):
        x, dy = layout(x), layout(dy)
        epilogue = Epilogue(weight, bias, residual, activation_of(activation))
        if with_residual:
            epilogue = epilogue._replace(residual=layout_of_residual(residual))
        y, _ = kernels.normalize(x, of.total, epilogue, EPS, None)
        assert y.dtype == dtype
        assert_near(y, of.y, eps * (of.y.abs().max() + 1), ulps)
        sums, dz = kernels.backward_sums(dy, x, of.statistics, epilogue)
        sizes = eps * torch.cat([over_channel(of.dz.abs()) + 1, over_channel((of.dz * of.xhat).abs()) + 1])
        rounding = (
            torch.finfo(dtype).eps if dz is not None and dtype != torch.float64 else 0
        )  # the sums are of what is stored
        slack = rounding * x[:, 0].numel() ** 0.5 * torch.ones_like(sizes)
        assert ((sums - of.sums).abs() <= ulps * sizes + slack).all()
        if with_residual and activation is not None:
            assert dz.dtype == dtype
            assert dz.stride() == y.stride()
        if dz is None:
            dx = kernels.backward_input(dy, x, of.statistics, epilogue._replace(residual=None), of.sums)
        else:
            assert_near(dz, of.dz, eps * (of.dz.abs().max() + 1), ulps)
            dx = kernels.backward_input(dz, x, of.statistics, Epilogue(weight, bias), of.sums)
        assert dx.dtype == dtype
        assert dx.stride() == y.stride()
        tolerance = eps * (of.dx.abs().max() + of.invstd.max()) + (rounding * of.dx.abs().max()) / ulps
        assert_near(dx, of.dx, tolerance, ulps)


EDGES = [0.0, -0.0, 3.0, -3.0, 1e-30, -1e-30, 88.0, -88.0, 104.0, -104.0, 720.0, -720.0, 1e38, -1e38, torch.inf]


@pytest.mark.parametrize("activation", FUNCTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_are_torchs_at_their_edges(kernels, activation, dtype):
    """z is what is read here: mean 0, variance 1, and the edges are the residual of zeros."""
    z = torch.tensor([*EDGES, torch.nan], dtype=dtype).repeat(5, 1).requires_grad_()
    x, dy = torch.zeros_like(z), torch.full_like(z, 0.5)
    expected = activation(z)
    (expected_dz,) = torch.autograd.grad(expected, z, dy)
    epilogue = Epilogue(None, None, z.detach(), activation_of(activation))
    c = z.shape[1]
    total, statistics = identity(c), packed(torch.zeros(c).double(), torch.ones(c).double(), 2)
    y, _ = kernels.normalize(x, total, epilogue, 0.0, None)
    _, dz = kernels.backward_sums(dy, x, statistics, epilogue)
    precision = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-30, "equal_nan": True}
    torch.testing.assert_close(y, expected.detach(), **precision)
    at_infinity = len(EDGES) - 1
    kept = [k for k in range(c) if k != at_infinity or not isinstance(activation, nn.SiLU)]  # inf·0 in the derivative
    torch.testing.assert_close(dz[:, kept], expected_dz[:, kept], **precision)


def test_epilogues_of_empty_tensors(kernels):
    for shape in [(0, 3), (2, 3, 0, 5)]:
        x, of = torch.empty(shape), torch.ones(7, dtype=torch.float64)
        epilogue = Epilogue(None, torch.ones(3), x, activation_of("silu"))
        y, _ = kernels.normalize(x, torch.zeros(7, dtype=torch.float64), epilogue, EPS, None)
        sums, dz = kernels.backward_sums(x, x, of, epilogue)
        assert y.shape == dz.shape == shape
        assert torch.equal(sums, torch.zeros(6, dtype=torch.float64))
        sums, _ = kernels.backward_sums(x, x, of, epilogue._replace(residual=None))
        assert kernels.backward_input(x, x, of, epilogue._replace(residual=None), sums).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 3, 7), (20, 33), (4, 3, 300), (2, 3, 4, 5, 6)], ids=str)
def test_all_layouts_give_the_same_bits_and_keep_their_memory_format(native, shape, dtype):
    x, dy = random(shape, dtype), random(shape, dtype, seed=1)
    weight = random(shape[1], torch.float32, seed=2)
    of = Reference(x, dy, weight, None)
    expected_y = normalize(native, x, of.total, weight, None)
    expected_dx = backward_input(native, dy, x, of.statistics, weight, of.sums)
    assert expected_y.is_contiguous()
    for layout in LAYOUTS:
        for layout_of_dy in (contiguous, channels_last, transposed):
            y = normalize(native, layout(x), of.total, weight, None)
            dx = backward_input(native, layout_of_dy(dy), layout(x), of.statistics, weight, of.sums)
            assert torch.equal(y, expected_y)
            assert torch.equal(dx, expected_dx)
            innermost_channels = layout in (channels_last, sliced_channels_last)
            dense = channels_last(x) if innermost_channels else contiguous(x)
            if layout is not transposed or x.dim() != 3:  # (N, C, L) transposed may be rows of channels
                assert y.stride() == dx.stride() == dense.stride()


def test_broadcast_gradients_as_sum_and_mean_make_them(kernels):
    x = random((3, 5, 4, 7), torch.float32)
    dy = torch.tensor(0.5).expand(x.shape)
    of = Reference(x, dy, None, None)
    for layout in LAYOUTS:
        assert torch.equal(
            backward_sums(kernels, dy, layout(x), of.statistics)[:5], torch.full((5,), 42.0, dtype=torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("first", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("shape", [(4, 3, 33, 40), (7, 30, 3, 9)], ids=str)
def test_large_means_do_not_cancel(kernels, dtype, layout, first, shape):
    """mean/std = 1e4, whatever the first values of each channel are."""
    x = random(shape, dtype, mean=1e4)
    x[:, :, 0, :2] = first
    dy = random(x.shape, dtype, mean=1e3, seed=1)
    of = Reference(x, dy, None, None)
    x, dy = layout(x), layout(dy)
    n = of.count
    s1, s2 = kernels.moments(x)[:-1].chunk(2)
    mean, variance = s1 / n, s2 / n - (s1 / n).square()
    assert ((mean - of.mean).abs() <= 1e-7 / of.invstd).all()
    torch.testing.assert_close(variance, of.invstd**-2 - EPS, rtol=1e-6 if dtype == torch.float32 else 1e-7, atol=0)
    y = normalize(kernels, x, of.total, None, None)
    assert_near(y, of.y, COMPUTE_EPS[dtype] * of.y.abs().max(), 4)
    sums = backward_sums(kernels, dy, x, of.statistics)
    sizes = torch.cat([over_channel(dy.abs()), over_channel((dy * of.xhat).abs())])
    assert_near(sums, of.sums, COMPUTE_EPS[dtype] * sizes, sums_within(kernels))
    dx = backward_input(kernels, dy, x, of.statistics, None, of.sums)
    assert_near(dx, of.dx, COMPUTE_EPS[dtype] * (of.dx.abs().max() + of.invstd.max()), 8)


def errors(y, dx, dweight, dbias, of):
    """Root mean square errors of what a layer yields."""
    dbias_of, dweight_of = of.sums.chunk(2)
    pairs = [(y, of.y), (dx, of.dx), (dweight, dweight_of), (dbias, dbias_of)]
    return [(actual.double() - expected).square().mean().sqrt().item() for actual, expected in pairs]


@pytest.mark.parametrize(
    ("dtype", "mean", "activation"),
    [
        *((dtype, 0, activation) for dtype in DTYPES for activation in (nn.Identity(), nn.ReLU(), nn.SiLU())),
        # Not float64 with a mean: Σx² in float64 loses (mean/std)² units, which float32 never sees.
        *((dtype, 10, nn.Identity()) for dtype in DTYPES if dtype != torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 32, 24, 31), (16, 64, 7, 7), (2, 64, 7, 7), (256, 64)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_at_most_twice_the_error_of_nn_batch_norm(kernels, shape, dtype, layout, mean, activation):
    x, dy = layout(random(shape, dtype, mean=mean)), layout(random(shape, dtype, seed=1))
    theirs = nn.BatchNorm1d(shape[1]) if x.dim() == 2 else nn.BatchNorm2d(shape[1])
    theirs = theirs.to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(random(shape[1], dtype, seed=2))
        theirs.bias.copy_(random(shape[1], dtype, seed=3))
    weight, bias = theirs.weight.detach(), theirs.bias.detach()
    of = Reference(x, dy, weight, bias, activation=activation)
    leaf = x.clone().requires_grad_()
    theirs_y = activation(theirs(leaf))
    theirs_y.backward(dy)

    epilogue = Epilogue(weight, bias, None, activation_of(activation))
    y, ours = kernels.normalize(x, kernels.moments(x), epilogue, EPS, None)
    sums, dz = kernels.backward_sums(dy, x, ours, epilogue)
    rest = epilogue if dz is None else epilogue._replace(activation=None)
    dx = kernels.backward_input(dy if dz is None else dz, x, ours, rest, sums)
    dbias, dweight = sums.to(dtype).chunk(2)
    ours = errors(y, dx, dweight, dbias, of)
    reference = errors(theirs_y, leaf.grad, theirs.weight.grad, theirs.bias.grad, of)
    for name, own, other in zip(["y", "dx", "dweight", "dbias"], ours, reference, strict=True):
        assert own <= 2 * other + 1e-16, f"{name}: {own:.3g} against {other:.3g}"


def test_agrees_with_torch_batch_norm(kernels):
    x, dy = random((4, 5, 6, 7), torch.float64).requires_grad_(), random((4, 5, 6, 7), torch.float64, seed=1)
    weight, bias = (random(5, torch.float64, seed=seed).requires_grad_() for seed in (2, 3))
    expected = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    expected.backward(dy)
    of = Reference(x.detach(), dy, weight.detach(), bias.detach())
    y = normalize(kernels, x.detach(), of.total, weight.detach(), bias.detach())
    sums = backward_sums(kernels, dy, x.detach(), of.statistics)
    dx = backward_input(kernels, dy, x.detach(), of.statistics, weight.detach(), sums)
    for actual, theirs in [(y, expected), (dx, x.grad), (sums, torch.cat([bias.grad, weight.grad]))]:
        torch.testing.assert_close(actual, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 61), (2, 5, 4099), (12, 5, 7), (50, 5)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_infinities_and_nans_stay_in_their_channels(kernels, dtype, shape, layout):
    x = random(shape, dtype)
    clean = kernels.moments(layout(x))[:-1]
    for channel, value in [(1, torch.inf), (2, -torch.inf), (4, torch.nan)]:
        x[-1, channel, ...].view(-1)[-1] = value
    sums = kernels.moments(layout(x))[:-1].view(2, -1)
    assert not sums[:, [1, 2, 4]].isfinite().any()
    assert torch.equal(sums[:, [0, 3]], clean.view(2, -1)[:, [0, 3]])

    y = normalize(kernels, layout(x), identity(5), eps=0)
    assert torch.equal(y.nan_to_num(nan=9, posinf=7, neginf=5), x.nan_to_num(nan=9, posinf=7, neginf=5))
    total, of = identity(5), packed(torch.zeros(5).double(), torch.ones(5).double(), 1)
    total[3] = of[3] = torch.nan
    x = random(shape, dtype)
    for y in normalize(kernels, x, total), backward_input(kernels, x, x, of, None, torch.zeros(10).double()):
        assert y[:, 3].isnan().all()
        assert y[:, [0, 1, 2, 4]].isfinite().all()
    dy = random(shape, dtype)
    dy[0, 1, ...].view(-1)[0] = torch.nan
    of[3] = 0
    sums = backward_sums(kernels, layout(dy), layout(x), of).view(2, -1)
    assert sums[:, 1].isnan().all()
    assert sums[:, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_comes_back(kernels, dtype):
    """Identity coefficients: each of the 65536 patterns is read and written again, subnormals and NaN included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for shape in [(2, 1, 2**15), (2**16, 1)]:
        y = normalize(kernels, x.view(shape), identity(1), eps=0).view(-1)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_to_nearest_even(kernels, dtype):
    """Any float32, all halfway cases and their neighbours, as biases: against torch's conversion."""
    if kernels is _triton:
        pytest.skip("half a million channels are too many for Triton's interpreter")
    halves = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    halfway = (halves[:-1] + halves[1:]) / 2
    overflow = torch.tensor(65520.0)  # the first float16 infinity
    ties = torch.cat([halfway, overflow.view(1)]).view(torch.int32)
    patterns = torch.randint(-(2**31), 2**31, (100000,), generator=torch.Generator().manual_seed(0)).int()
    patterns = torch.cat([patterns, ties, ties - 1, ties + 1, torch.tensor([-1, 2**31 - 1])])  # NaN of all ones
    bias = torch.cat([patterns, patterns ^ -(2**31)]).int().view(torch.float32)
    zero = torch.zeros(1, len(bias), dtype=dtype)
    y = normalize(kernels, zero, identity(len(bias)), zero[0], bias)[0]
    expected = bias.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 33, 50, 41), (20000, 33), (8, 16, 60, 60), (256, 128, 7, 7), (1, 1, 300000)], ids=str
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_same_bits_with_any_number_of_threads(threads, dtype, shape, layout):
    x, dy = layout(random(shape, dtype)), layout(random(shape, dtype, seed=1))
    weight = random(shape[1], torch.float32, seed=2)
    total, of = total_of(x), Reference(x, dy, None, None).statistics
    sums = random(2 * shape[1], torch.float64)
    results = []
    for number in (1, 2, 3, 2):
        threads(number)
        results.append([
            compiled.moments(x),
            normalize(compiled, x, total, weight, weight),
            backward_sums(compiled, dy, x, of),
            backward_input(compiled, dy, x, of, weight, sums),
            *compiled.backward_sums(dy, x, of, Epilogue(weight, weight, dy, activation_of("silu"))),
        ])  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_results_too_large_for_the_caches(native, layout, threads):
    """Stored past them, which needs aligned planes or rows: 112² floats are, 111·113 are not. Half of it is not."""
    threads(2)
    for shape in [(6, 64, 112, 112), (6, 64, 111, 113), (6, 63, 112, 112)]:
        x, dy = layout(torch.randn(shape)), layout(torch.randn(shape))
        assert x.numel() * 4 >= 1 << 24 > x[:3].numel() * 4
        total, of = identity(shape[1]), torch.full((2 * shape[1] + 1,), 0.5, dtype=torch.float64)
        y, dx = normalize(native, x, total), backward_input(native, dy, x, of, None, of[:-1])
        for half in (slice(3), slice(3, 6)):
            assert torch.equal(y[half], normalize(native, x[half], total))
            assert torch.equal(dx[half], backward_input(native, dy[half], x[half], of, None, of[:-1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0), (2, 3, 0, 5), (0, 1)], ids=str)
def test_empty_tensors(kernels, dtype, shape):
    x, c = torch.empty(shape, dtype=dtype), shape[1]
    of, zeros = torch.ones(2 * c + 1, dtype=torch.float64), torch.zeros(2 * c, dtype=torch.float64)
    weight = torch.ones(c)
    assert torch.equal(kernels.moments(x), torch.zeros(2 * c + 1, dtype=torch.float64))
    assert torch.equal(backward_sums(kernels, x, x, of), zeros)
    y, statistics = kernels.normalize(
        x, torch.zeros(2 * c + 1, dtype=torch.float64), Epilogue(weight, weight), 0.25, None
    )
    assert y.shape == backward_input(kernels, x, x, of, weight, zeros).shape == shape
    assert torch.equal(statistics, packed(zeros[:c], zeros[:c] + 2, 0))


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 5)], ids=str)
def test_no_channels(native, shape):
    x, nothing = torch.empty(shape), torch.empty(0)
    total, sums = torch.zeros(1, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    assert native.moments(x).tolist() == [0]
    assert normalize(native, x, total, nothing, nothing).shape == shape
    assert backward_input(native, x, x, total, nothing, sums).shape == shape


def test_parameters_of_any_floating_dtype_and_stride(kernels):
    x = random((6, 4, 5), torch.float32)
    total = total_of(x)
    values = torch.tensor([1.5, -2.0, 0.25, 3.0])
    expected = normalize(kernels, x, total, values, values)
    for dtype in DTYPES:
        parameter = values.to(dtype).repeat_interleave(2)[::2]
        spread = torch.stack([total, total], 1)
        assert torch.equal(normalize(kernels, x, spread[:, 0], parameter, nn.Parameter(parameter)), expected)
    same = torch.tensor(1.5).expand(4)  # one value in memory
    assert torch.equal(
        normalize(kernels, x, total, same, same), normalize(kernels, x, total, same.clone(), same.clone())
    )


def test_results_lie_where_the_input_does(kernels):
    x = random((4, 3, 5), torch.float32)
    with torch.device("meta"):
        payload = kernels.moments(x)
        y, of = kernels.normalize(x, payload, Epilogue(), EPS, None)
        sums = backward_sums(kernels, x, x, of)
        dx = backward_input(kernels, x, x, of, None, sums)
    assert all(t.device.type == "cpu" for t in (payload, y, of, sums, dx))


def move(kernels, running, x):
    kernels.normalize(x, kernels.moments(x), Epilogue(), EPS, running)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_move_as_those_of_nn_batch_norm(kernels, dtype):
    theirs = nn.BatchNorm1d(3, dtype=torch.float64)
    ours = Running(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype).repeat_interleave(2)[::2], torch.tensor(0))
    versions = [t._version for t in ours[:3]]
    for seed, momentum in enumerate([0.25, 1, torch.tensor(0.5, dtype=torch.float64), 0.0]):
        x = random((4, 3, 5), torch.float64, mean=2, seed=seed)
        theirs.momentum = float(momentum)
        theirs(x)
        move(kernels, ours._replace(momentum=momentum), x)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-7 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(ours.mean.double(), theirs.running_mean, **tolerance)
    torch.testing.assert_close(ours.var.double(), theirs.running_var, **tolerance)
    assert ours.batches.item() == 4
    assert all(t._version > before for t, before in zip(ours[:3], versions, strict=True))


def test_without_momentum_they_are_averages(kernels):
    theirs = nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    ours = Running(torch.full((3,), 7.0).double(), torch.full((3,), 7.0).double(), torch.tensor(0), None)
    for seed in range(3):
        x = random((4, 3, 5), torch.float64, seed=seed)
        theirs(x)
        move(kernels, ours, x)
        torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.var, theirs.running_var, rtol=1e-12, atol=1e-14)
    untouched = ours.mean.clone()
    move(kernels, Running(ours.mean, None, None, None), x)  # no count: no average
    assert torch.equal(ours.mean, untouched)


def test_a_batch_without_values_is_counted_and_moves_nothing_else(kernels):
    running = Running(torch.tensor([1.0, torch.inf]), torch.tensor([2.0, torch.nan]), torch.tensor(4))
    before = [t.clone() for t in running[:2]]
    move(kernels, running, torch.empty(0, 2))
    assert running.batches.item() == 5
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(running[:2], before, strict=True))


@pytest.mark.parametrize("momentum", [0.5, None])
def test_a_forward_that_was_counted_moves_nothing(momentum):
    running = Running(torch.ones(2), torch.ones(2), torch.tensor(0), momentum)
    total = total_of(random((4, 2), torch.float32))
    total[-1] = -1
    update_running(running, total)
    assert [t.tolist() for t in running[:3]] == [[1, 1], [1, 1], 0]


def test_one_value_has_no_variance(kernels):
    running = Running(torch.ones(2), torch.ones(2), torch.tensor(0))
    with pytest.raises(InputError, match="more than 1 value"):
        move(kernels, running, torch.zeros(1, 2))
    assert [t.tolist() for t in running[:3]] == [[1, 1], [1, 1], 0]


def test_one_value_moves_what_a_device_cannot_refuse():
    """On an accelerator nobody looks at N: the variance of one value counts as it is."""
    running = Running(torch.ones(1), torch.ones(1), torch.tensor(0), 0.5)
    update_running(running, torch.tensor([3.0, 13.0, 1.0]).double())
    assert [t.tolist() for t in running[:3]] == [[2.0], [2.5], 1]
    dx = backward_input(
        _composed,
        torch.tensor([[2.0]]),
        torch.zeros(1, 1),
        torch.tensor([0.0, 1.0, 1.0]).double(),
        None,
        torch.tensor([2.0, 0.0]),
    )
    assert dx.tolist() == [[0.0]]


def test_either_buffer_may_be_absent(kernels):
    x, var, mean = random((4, 3), torch.float64), torch.ones(3), torch.zeros(3)
    move(kernels, Running(None, var), x)
    move(kernels, Running(mean, None), x)
    torch.testing.assert_close(var.double(), 0.9 + 0.1 * x.var(0))
    torch.testing.assert_close(mean.double(), 0.1 * x.mean(0))


EXCHANGE = "__dlpack_c_exchange_api__"  # torch describes a tensor in one call, from 2.10 on

# The boundary of the compiled module. Each argument lies between guards.
SIZE, CHANNELS, GUARD = (2, 3, 67), 3, 100


def guarded(numel, dtype=torch.float64):
    return torch.full((GUARD + numel + GUARD,), 0.5, dtype=dtype)[GUARD:-GUARD]


def arguments():
    """Of each entry, by name, in order; those it writes to come last in WRITTEN."""
    names, c = ("x", "y", "dy", "dx", "dz", "residual"), CHANNELS
    big = {name: guarded(2 * 3 * 67, torch.float32).view(SIZE) for name in names}
    of, channel = {"total": guarded(2 * c + 1), "statistics": guarded(2 * c + 1)}, guarded(c, torch.float32)
    running = Running(guarded(c, torch.float32), guarded(c), torch.tensor(0), 0.5)
    return {
        "moments": {"x": big["x"], "payload": guarded(2 * c + 1)},
        "normalize": {
            "x": big["x"], "y": big["y"], **of, "weight": channel, "bias": channel, "residual": big["residual"],
            "activation": activation_of("silu"), "eps": EPS, "running": running,
        },
        "backward_sums": {
            "dy": big["dy"], "x": big["x"], "statistics": of["statistics"], "weight": channel, "bias": channel,
            "residual": big["residual"], "activation": activation_of("silu"), "payload": guarded(2 * c),
            "dz": big["dz"],
        },
        "backward_input": {
            "dy": big["dy"], "x": big["x"], "dx": big["dx"], "statistics": of["statistics"], "weight": channel,
            "bias": channel, "residual": None, "activation": activation_of("silu"), "sums": guarded(2 * c),
        },
    }  # fmt: skip


WRITTEN = {
    "moments": ["payload"],
    "normalize": ["y", "statistics"],
    "backward_sums": ["payload", "dz"],
    "backward_input": ["dx"],
}
TENSORS = [(entry, name) for entry, named in arguments().items() for name in named if torch.is_tensor(named[name])]
RUNNING = ["running_mean", "running_var", "num_batches_tracked"]


def call(entry, named):
    if "weight" in named:  # in the place of the first of the four
        epilogue = Epilogue(*(named[name] for name in Epilogue._fields))
        names = [name for name in named if name not in Epilogue._fields[1:]]
        named = {name: epilogue if name == "weight" else named[name] for name in names}
    return getattr(_native, entry)(1, *named.values())


def untouched(entry, named):
    tensors = [named[name] for name in WRITTEN[entry]] + [t for t in named.get("running") or () if torch.is_tensor(t)]
    return all((t == 0.5).all() or (t.dtype == torch.int64 and not t.any()) for t in tensors)


@pytest.mark.parametrize("entry", WRITTEN)
def test_nothing_is_written_outside(native, entry):
    for count in (0, 402 // 3):  # of values, in the total
        named = arguments()[entry]
        if entry == "normalize":
            named["total"][-1] = count
        call(entry, named)
        assert not untouched(entry, named)
        for tensor in named.values():
            if torch.is_tensor(tensor):
                whole = tensor._base if tensor._base is not None else tensor
                guards = torch.cat([whole[:GUARD], whole[-GUARD:]])
                assert (guards == 0.5).all()


def wrong_sizes(tensor):
    """Too short, too long, empty; of x, those that no other argument fits."""
    if tensor.dim() == 1:
        return [tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor[:0]]
    return [tensor[:1], tensor[:, :2], torch.cat([tensor, tensor]), tensor[:0], tensor[:, :, 1:].contiguous()]


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_lengths_are_refused_by_name_before_anything_is_written(entry, name):
    good = arguments()[entry][name]
    for wrong in [good[:, :2]] if (entry, name) == ("moments", "x") else wrong_sizes(good):
        named = {**arguments()[entry], name: wrong}
        with pytest.raises(ValueError, match=r"^\w+: expected "):
            call(entry, named)
        assert untouched(entry, named)
    if name != "x":  # of that, all others would be wrong
        with pytest.raises(ValueError, match=f"^{name}: "):
            call(entry, named)


@pytest.mark.parametrize("position", range(3))
def test_wrong_lengths_of_buffers(position):
    for length in (2, 4, 0):
        named = arguments()["normalize"]
        running = list(named["running"])
        running[position] = torch.zeros(length, dtype=torch.int64 if position == 2 else torch.float32)
        named["running"] = tuple(running)
        with pytest.raises(ValueError, match=f"^{RUNNING[position]}: expected "):
            call("normalize", named)
        assert (named["y"] == 0.5).all()


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_what_is_no_memory_of_the_cpu_is_refused_by_name(entry, name):
    good = arguments()[entry][name]
    integers = {**arguments()[entry], name: good.long()}
    with pytest.raises(TypeError, match=f"^{name}: unexpected torch.int64|^(y|dy|dx): unexpected torch.float32"):
        call(entry, integers)
    freed = good.clone()
    freed.untyped_storage().resize_(0)
    for wrong, why in ((good.to("meta"), "on the CPU"), (Wrapper(good), "no memory of its own"), (freed, "no memory")):
        named = {**arguments()[entry], name: wrong}
        with pytest.raises((ValueError, RuntimeError), match=f"^{name}: .*{why}"):
            call(entry, named)
        assert untouched(entry, {**named, name: arguments()[entry][name]})


def test_results_have_dense_memory():
    named = arguments()["moments"]
    for wrong in (torch.zeros(1).double().expand(7), torch.zeros(14).double()[::2]):
        with pytest.raises(ValueError, match=r"^payload: expected a contiguous tensor"):
            call("moments", {**named, "payload": wrong})
    with pytest.raises(ValueError, match=r"^x: expected a dense tensor"):
        call("moments", {**named, "x": named["x"][..., ::2]})


def test_absent_parameters_are_none_and_nothing_else(native):
    named = arguments()["normalize"]
    named["total"].copy_(identity(3))
    absent = {**named, **dict.fromkeys(["weight", "bias", "residual", "activation", "running"]), "eps": 0.0}
    call("normalize", absent)
    assert torch.equal(named["y"], named["x"])
    with pytest.raises(ValueError, match=r"^weight: expected 3 values, got 0"):
        call("normalize", {**named, "weight": torch.empty(0)})


def test_strange_epilogues_are_refused_by_name():
    named = arguments()["backward_sums"]
    unknown = {"activation": ("gelu", 0.0)}, {"activation": (3, 0.0)}, {"activation": ("relu",)}, {"activation": "relu"}
    for wrong in unknown:
        with pytest.raises(ValueError, match=r"^activation: "):
            call("backward_sums", {**named, **wrong})
    with pytest.raises(TypeError, match="real number"):
        call("backward_sums", {**named, "activation": ("relu", "steep")})
    with pytest.raises(ValueError, match=r"^dz: expected a tensor"):
        call("backward_sums", {**named, "dz": None})
    with pytest.raises(ValueError, match=r"^residual: expected None"):
        call("backward_input", {**arguments()["backward_input"], "residual": named["x"]})
    with pytest.raises(ValueError, match=r"^epilogue: expected a tuple of 4"):
        _native.backward_sums(1, named["dy"], named["x"], named["statistics"], (None, None), named["payload"], None)
    assert untouched("backward_sums", named)


class Wrapper(torch.Tensor):
    """A tensor around another, as DTensor is: without memory."""

    @staticmethod
    def __new__(cls, of):
        return torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype, device=of.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class Named(torch.Tensor):
    pass


def strange_tensors():
    x = torch.randn(3)
    return {
        "wrapper": Wrapper(x),
        "subclass": x.as_subclass(Named),
        "negative view": torch._neg_view(x),
        "imaginary part of a conjugate": torch.randn(3, dtype=torch.complex64).conj().imag,
        "complex": torch.randn(3, dtype=torch.complex64),
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "float8": x.to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("kind", strange_tensors())
def test_strange_tensors_go_to_the_composed_kernels(kind):
    x, strange = torch.randn(2, 3), strange_tensors()[kind]
    plain = (x, nn.Parameter(x), nn.Buffer(x), None, torch.tensor(0))
    assert kernels_for(*plain) is compiled
    assert are_plain(plain, "cpu")
    for position in range(len(plain)):
        tensors = list(plain)
        tensors[position] = strange
        assert not compiled.takes(*tensors)
        assert not are_plain(tensors, "cpu")  # the same predicate, for other devices in Python
        assert kernels_for(*tensors) is _composed


def test_wrapped_tensors_go_to_the_composed_kernels():
    weight, chosen = torch.ones(2), []

    def f(x):
        chosen.append((kernels_for(x), kernels_for(weight), kernels_for(weight, x)))
        return (x * 2).sum()

    torch.func.grad(f)(torch.randn(3, 2))
    torch.vmap(f)(torch.randn(3, 2))
    assert chosen == [(_composed, compiled, _composed)] * 2


def test_negative_views_are_read_right():
    x = random((4, 3, 5), torch.float32)
    negative = torch._neg_view(x)
    kernels = kernels_for(x, negative)
    assert torch.equal(kernels.moments(negative)[:3], -kernels.moments(x)[:3])


def test_the_environment_forces_the_composed_kernels(monkeypatch):
    assert kernels_for(torch.ones(1)) is compiled
    with composed_only():
        assert kernels_for(torch.ones(1)) is _composed
    assert kernels_for(torch.ones(1)) is compiled
    monkeypatch.setattr(_select, "_sets", None)
    monkeypatch.setenv("SYNCBN_KERNELS", "composed")
    assert kernels_for(torch.ones(1)) is _composed


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=100)


def test_without_compiled_kernels_it_says_so_once_and_raises_nothing():
    """Not a warning: python -W error would make an exception of it, on one rank alone."""
    code = (
        "import sys; sys.modules['syncbn._native'] = None\n"
        "import torch; from syncbn.kernels import composed_only, kernels_for, _composed\n"
        "say = lambda text: print(text, file=sys.stderr)\n"
        "x = torch.ones(2, 2)\n"
        "with composed_only(): kernels_for(x)\n"
        "kernels_for(x.to('meta')); say('so far nothing')\n"  # which the compiled ones would not have taken either
        "assert kernels_for(x) is kernels_for(torch.ones(2)) is _composed\n"
    )
    job = run("-W", "error", "-c", code)
    assert job.returncode == 0, job.stderr
    nothing, said = job.stderr.splitlines()
    assert nothing == "so far nothing"
    assert re.search("several times slower.*compiled.*pip install.*SYNCBN_BUILD_NATIVE", said)


def test_objects_alive_at_exit_are_quiet():
    code = "import syncbn._native as n, builtins; builtins.alive = [n.moments]; sys = __import__('sys'); sys.alive = n"
    job = run("-c", code)
    assert (job.returncode, job.stderr) == (0, "")


def test_refuses_unknown_instruction_sets():
    with pytest.raises(ValueError, match="abacus"):
        _native.use_instruction_set("abacus")


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(torch.Tensor, EXCHANGE), reason="this torch has no exchange: all tests here go without")
def test_without_the_exchange_tensors_are_asked_for_their_attributes():
    code = f"import sys, pytest, torch; del torch.Tensor.{EXCHANGE}; sys.exit(pytest.main(sys.argv[1:]))"
    some = "outside or refused or wrapped or strange or without_momentum or parameters_of_any"
    job = run("-c", code, "-q", "-p", "no:cacheprovider", __file__, "-k", some)
    assert job.returncode == 0, job.stdout
