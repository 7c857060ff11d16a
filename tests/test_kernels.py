"""The compiled CPU kernels against the formulas in float64, for every dtype, memory layout and instruction set."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn.errors import DTypeError, InputError

kernels = pytest.importorskip(
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


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request):
    _native.use_instruction_set(request.param)
    yield request.param
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


def statistics(x):
    """[mean, 1/√(σ² + EPS), N] in float64."""
    n = x.numel() // x.shape[1]
    mean = over_channel(x) / n
    return packed(mean, (over_channel((x.double() - per_channel(mean, x)).square()) / n + EPS).rsqrt(), n)


def packed(mean, invstd, n):
    return torch.cat([mean, invstd, torch.tensor([n], dtype=torch.float64)])


class Reference:
    """The four results in float64, by the formulas."""

    def __init__(self, x, dy, weight, bias):
        self.statistics = statistics(x)
        self.mean, self.invstd, _ = self.statistics.tensor_split([x.shape[1], 2 * x.shape[1]])
        self.count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        x, dy = x.double(), dy.double()
        scale = self.invstd if weight is None else self.invstd * weight
        xhat = self.xhat = (x - per_channel(self.mean, x)) * per_channel(self.invstd, x)
        self.moments = torch.cat([over_channel(x), over_channel(x.square())])
        self.y = xhat * (1 if weight is None else per_channel(weight, x)) + (
            0 if bias is None else per_channel(bias, x)
        )
        self.sums = torch.cat([over_channel(dy), over_channel(dy * xhat)])
        t1, t2 = (self.sums / self.count).chunk(2)
        self.dx = per_channel(scale, x) * (dy - per_channel(t1, x) - xhat * per_channel(t2, x))


def assert_near(actual, expected, scale, ulps):
    """Equal within `ulps` units of the compute type, relative to `scale`, after rounding to the dtype of `actual`."""
    rounding = torch.finfo(actual.dtype).eps / 2 * expected.abs() if actual.dtype != torch.float64 else 0
    error = (actual.double() - expected).abs() - rounding
    assert (error <= ulps * scale).all(), f"{(error / scale).max():.3g} > {ulps}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formulas(instruction_set, shape, dtype):
    x, dy = random(shape, dtype, mean=0.5), random(shape, dtype, mean=-0.25, seed=1)
    weight, bias = random(shape[1], torch.float32, seed=2), random(shape[1], torch.float64, seed=3)
    of = Reference(x, dy, weight, bias)
    eps = COMPUTE_EPS[dtype]
    ulps = 16 if dtype == torch.float64 else 4  # the reference is no better than what it judges
    size_of_moments = eps * torch.cat([over_channel(x.abs()), over_channel(x.double().square())])
    size_of_sums = eps * torch.cat([over_channel(dy.abs()), over_channel((dy * of.xhat).abs()) + 1])
    for layout in LAYOUTS:
        x, dy = layout(x), layout(dy)
        sums, count = kernels.moments(x).tensor_split([-1])
        assert sums.dtype == torch.float64
        assert torch.equal(count, of.count)
        assert_near(sums, of.moments, size_of_moments, ulps)
        y = kernels.normalize(x, of.statistics, weight, bias)
        assert y.dtype == dtype
        assert_near(y, of.y, eps * (of.y.abs().max() + 1), ulps)
        sums = kernels.backward_sums(dy, x, of.statistics)
        assert_near(sums, of.sums, size_of_sums, ulps)
        dx = kernels.backward_input(dy, x, of.statistics, weight, of.sums)
        assert dx.dtype == dtype
        assert_near(dx, of.dx, eps * (of.dx.abs().max() + of.invstd.max()), ulps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 3, 7), (20, 33), (4, 3, 300), (2, 3, 4, 5, 6)], ids=str)
def test_all_layouts_give_the_same_bits_and_keep_their_memory_format(instruction_set, shape, dtype):
    x, dy = random(shape, dtype), random(shape, dtype, seed=1)
    weight = random(shape[1], torch.float32, seed=2)
    of = Reference(x, dy, weight, None)
    expected_y = kernels.normalize(x, of.statistics, weight, None)
    expected_dx = kernels.backward_input(dy, x, of.statistics, weight, of.sums)
    assert expected_y.is_contiguous()
    for layout in LAYOUTS:
        for layout_of_dy in (contiguous, channels_last, transposed):
            y = kernels.normalize(layout(x), of.statistics, weight, None)
            dx = kernels.backward_input(layout_of_dy(dy), layout(x), of.statistics, weight, of.sums)
            assert torch.equal(y, expected_y)
            assert torch.equal(dx, expected_dx)
            innermost_channels = layout in (channels_last, sliced_channels_last)
            dense = channels_last(x) if innermost_channels else contiguous(x)
            if layout is not transposed or x.dim() != 3:  # (N, C, L) transposed may be rows of channels
                assert y.stride() == dx.stride() == dense.stride()


def test_broadcast_gradients_as_sum_and_mean_make_them(instruction_set):
    x = random((3, 5, 4, 7), torch.float32)
    dy = torch.tensor(0.5).expand(x.shape)
    of = Reference(x, dy, None, None)
    for layout in LAYOUTS:
        assert torch.equal(
            kernels.backward_sums(dy, layout(x), of.statistics)[:5], torch.full((5,), 42.0, dtype=torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("first", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("shape", [(4, 3, 33, 40), (7, 30, 3, 9)], ids=str)
def test_large_means_do_not_cancel(instruction_set, dtype, layout, first, shape):
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
    y = kernels.normalize(x, of.statistics, None, None)
    assert_near(y, of.y, COMPUTE_EPS[dtype] * of.y.abs().max(), 4)
    sums = kernels.backward_sums(dy, x, of.statistics)
    sizes = torch.cat([over_channel(dy.abs()), over_channel((dy * of.xhat).abs())])
    assert_near(sums, of.sums, COMPUTE_EPS[dtype] * sizes, 4)
    dx = kernels.backward_input(dy, x, of.statistics, None, of.sums)
    assert_near(dx, of.dx, COMPUTE_EPS[dtype] * (of.dx.abs().max() + of.invstd.max()), 8)


def errors(y, dx, dweight, dbias, of):
    """Root mean square errors of what a layer yields."""
    dbias_of, dweight_of = of.sums.chunk(2)
    pairs = [(y, of.y), (dx, of.dx), (dweight, dweight_of), (dbias, dbias_of)]
    return [(actual.double() - expected).square().mean().sqrt().item() for actual, expected in pairs]


# Not float64 with a mean: Σx² in float64 loses (mean/std)² units, which float32 never sees.
@pytest.mark.parametrize(
    ("dtype", "mean"), [*((dtype, 0) for dtype in DTYPES), *((d, 10) for d in DTYPES if d != torch.float64)]
)
@pytest.mark.parametrize("shape", [(4, 32, 24, 31), (16, 64, 7, 7), (2, 64, 7, 7), (256, 64)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_at_most_twice_the_error_of_nn_batch_norm(instruction_set, shape, dtype, layout, mean):
    x, dy = layout(random(shape, dtype, mean=mean)), layout(random(shape, dtype, seed=1))
    theirs = nn.BatchNorm1d(shape[1]) if x.dim() == 2 else nn.BatchNorm2d(shape[1])
    theirs = theirs.to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(random(shape[1], dtype, seed=2))
        theirs.bias.copy_(random(shape[1], dtype, seed=3))
    weight, bias = theirs.weight.detach(), theirs.bias.detach()
    of = Reference(x, dy, weight, bias)
    leaf = x.clone().requires_grad_()
    theirs_y = theirs(leaf)
    theirs_y.backward(dy)

    n = of.count
    s1, s2 = kernels.moments(x)[:-1].chunk(2)
    ours = packed(s1 / n, (s2 / n - (s1 / n).square() + EPS).rsqrt(), n)
    y = kernels.normalize(x, ours, weight, bias)
    sums = kernels.backward_sums(dy, x, ours)
    dx = kernels.backward_input(dy, x, ours, weight, sums)
    dbias, dweight = sums.to(dtype).chunk(2)
    ours = errors(y, dx, dweight, dbias, of)
    reference = errors(theirs_y, leaf.grad, theirs.weight.grad, theirs.bias.grad, of)
    for name, own, other in zip(["y", "dx", "dweight", "dbias"], ours, reference, strict=True):
        assert own <= 2 * other + 1e-16, f"{name}: {own:.3g} against {other:.3g}"


def test_agrees_with_torch_batch_norm(instruction_set):
    x, dy = random((4, 5, 6, 7), torch.float64).requires_grad_(), random((4, 5, 6, 7), torch.float64, seed=1)
    weight, bias = (random(5, torch.float64, seed=seed).requires_grad_() for seed in (2, 3))
    expected = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    expected.backward(dy)
    of = Reference(x.detach(), dy, weight.detach(), bias.detach())
    y = kernels.normalize(x.detach(), of.statistics, weight.detach(), bias.detach())
    sums = kernels.backward_sums(dy, x.detach(), of.statistics)
    dx = kernels.backward_input(dy, x.detach(), of.statistics, weight.detach(), sums)
    for actual, theirs in [(y, expected), (dx, x.grad), (sums, torch.cat([bias.grad, weight.grad]))]:
        torch.testing.assert_close(actual, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 61), (2, 5, 4099), (12, 5, 7), (50, 5)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_infinities_and_nans_stay_in_their_channels(instruction_set, dtype, shape, layout):
    x = random(shape, dtype)
    clean = kernels.moments(layout(x))[:-1]
    for channel, value in [(1, torch.inf), (2, -torch.inf), (4, torch.nan)]:
        x[-1, channel, ...].view(-1)[-1] = value
    sums = kernels.moments(layout(x))[:-1].view(2, -1)
    assert not sums[:, [1, 2, 4]].isfinite().any()
    assert torch.equal(sums[:, [0, 3]], clean.view(2, -1)[:, [0, 3]])

    zero, one = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    y = kernels.normalize(layout(x), packed(zero, one, 1), None, None)
    assert torch.equal(y.nan_to_num(nan=9, posinf=7, neginf=5), x.nan_to_num(nan=9, posinf=7, neginf=5))
    nan_mean = zero.index_fill(0, torch.tensor(3), torch.nan)
    for y in (
        kernels.normalize(random(shape, dtype), packed(nan_mean, one, 1), None, None),
        kernels.backward_input(
            random(shape, dtype), random(shape, dtype), packed(nan_mean, one, 1), None, torch.zeros(10).double()
        ),
    ):
        assert y[:, 3].isnan().all()
        assert y[:, [0, 1, 2, 4]].isfinite().all()
    dy = random(shape, dtype)
    dy[0, 1, ...].view(-1)[0] = torch.nan
    sums = kernels.backward_sums(layout(dy), layout(random(shape, dtype)), packed(zero, one, 1)).view(2, -1)
    assert sums[:, 1].isnan().all()
    assert sums[:, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_comes_back(instruction_set, dtype):
    """Identity coefficients: each of the 65536 patterns is read and written again, subnormals and NaN included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    one = torch.ones(1, dtype=torch.float64)
    for shape in [(2, 1, 2**15), (2**16, 1)]:
        y = kernels.normalize(x.view(shape), packed(0 * one, one, 1), None, None).view(-1)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_to_nearest_even(instruction_set, dtype):
    """Any float32, all halfway cases and their neighbours, as biases: against torch's conversion."""
    halves = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    halfway = (halves[:-1] + halves[1:]) / 2
    overflow = torch.tensor(65520.0)  # the first float16 infinity
    ties = torch.cat([halfway, overflow.view(1)]).view(torch.int32)
    patterns = torch.randint(-(2**31), 2**31, (100000,), generator=torch.Generator().manual_seed(0)).int()
    patterns = torch.cat([patterns, ties, ties - 1, ties + 1, torch.tensor([-1, 2**31 - 1])])  # NaN of all ones
    bias = torch.cat([patterns, patterns ^ -(2**31)]).int().view(torch.float32)
    zero = torch.zeros(len(bias), dtype=torch.float64)
    y = kernels.normalize(zero.to(dtype).view(1, -1), packed(zero, zero, 1), None, bias)[0]
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
    of = statistics(x)
    sums = random(2 * shape[1], torch.float64)
    results = []
    for number in (1, 2, 3, 2):
        threads(number)
        results.append([
            kernels.moments(x),
            kernels.normalize(x, of, weight, weight),
            kernels.backward_sums(dy, x, of),
            kernels.backward_input(dy, x, of, weight, sums),
        ])  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_results_too_large_for_the_caches(instruction_set, layout, threads):
    """Stored past them, which needs aligned planes or rows: 112² float32 values are, 111·113 are not."""
    threads(2)
    for shape in [(6, 64, 112, 112), (6, 64, 111, 113), (6, 63, 112, 112)]:
        x, dy = layout(random(shape, torch.float32)), layout(random(shape, torch.float32, seed=1))
        assert x.numel() * 4 >= 1 << 24
        of = Reference(x, dy, None, None)
        y = kernels.normalize(x, of.statistics, None, None)
        dx = kernels.backward_input(dy, x, of.statistics, None, of.sums)
        assert_near(y, of.y, 2**-24 * of.y.abs().max(), 4)
        assert_near(dx, of.dx, 2**-24 * of.dx.abs().max(), 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 67), (9, 3, 5), (2, 33), (11, 3), (1, 1, 4097)], ids=str)
def test_nothing_is_written_outside(instruction_set, dtype, shape):
    n, c, s = (*shape, 1)[:3]
    size = n * c * s
    x, zero, one = random(size, dtype), torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
    identity = packed(zero, one, 1)
    sums = torch.zeros(2 * c, dtype=torch.float64)
    code = kernels._CODES[dtype]
    for backward in (False, True):
        out = torch.full((size + 200,), 7, dtype=dtype)
        address = out[100:].data_ptr()
        if backward:
            tensors = [x.data_ptr(), x.data_ptr(), address, identity.data_ptr(), 0, 0]
            _native.backward_input(code, 1, n, c, s, *tensors, sums.data_ptr())
        else:
            _native.normalize(code, 1, n, c, s, x.data_ptr(), address, identity.data_ptr(), 0, 0, 0, 0)
        assert torch.equal(out[100 : 100 + size], x)
        assert (out[:100] == 7).all()
        assert (out[100 + size :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0), (2, 3, 0, 5), (0, 0), (4, 0, 5)], ids=str)
def test_empty_tensors(instruction_set, dtype, shape):
    x, c = torch.empty(shape, dtype=dtype), shape[1]
    of, zeros = torch.ones(2 * c + 1, dtype=torch.float64), torch.zeros(2 * c, dtype=torch.float64)
    weight = torch.ones(c)
    assert torch.equal(kernels.moments(x), torch.zeros(2 * c + 1, dtype=torch.float64))
    assert torch.equal(kernels.backward_sums(x, x, of), zeros)
    assert kernels.normalize(x, of, weight, weight).shape == shape
    assert kernels.backward_input(x, x, of, weight, zeros).shape == shape


def test_parameters_of_any_floating_dtype_and_stride(instruction_set):
    x = random((6, 4, 5), torch.float32)
    of = statistics(x)
    values = torch.tensor([1.5, -2.0, 0.25, 3.0])
    expected = kernels.normalize(x, of, values, values)
    for dtype in DTYPES:
        parameter = values.to(dtype).repeat_interleave(2)[::2]
        spread = torch.stack([of, of], 1)
        y = kernels.normalize(x, spread[:, 0], parameter, nn.Parameter(parameter))
        assert torch.equal(y, expected)


GOOD = {
    "dy": torch.zeros(2, 3, 4),
    "x": torch.zeros(2, 3, 4),
    "statistics": torch.ones(7, dtype=torch.float64),
    "weight": torch.zeros(3),
    "bias": torch.zeros(3),
    "sums": torch.zeros(6, dtype=torch.float64),
}
ARGUMENTS = {
    "moments": ["x"],
    "normalize": ["x", "statistics", "weight", "bias"],
    "backward_sums": ["dy", "x", "statistics"],
    "backward_input": ["dy", "x", "statistics", "weight", "sums"],
}
CASES = [(kernel, argument) for kernel, arguments in ARGUMENTS.items() for argument in arguments]


def call(kernel, **replaced):
    return getattr(kernels, kernel)(*[replaced.get(name, GOOD[name]) for name in ARGUMENTS[kernel]])


@pytest.mark.parametrize(("kernel", "argument"), CASES)
def test_refuses_by_name(kernel, argument):
    call(kernel)
    good = GOOD[argument]
    with pytest.raises(DTypeError, match=f"^{argument}: expected .*int32"):
        call(kernel, **{argument: good.int()})
    for bad in (good.to("meta"), good.to_sparse()):
        with pytest.raises(InputError, match=f"^{argument}: expected a strided tensor on the CPU"):
            call(kernel, **{argument: bad})
    shape = re.escape(str((5,)))
    if argument != "x":
        with pytest.raises(InputError, match=f"^{argument}: expected .*shape.* got {shape}"):
            call(kernel, **{argument: torch.zeros(5, dtype=good.dtype)})
    else:
        with pytest.raises(InputError, match=f"^x: expected 2D or more, .* got {shape}"):
            call(kernel, x=torch.zeros(5))


def test_refuses_dy_of_another_dtype():
    with pytest.raises(DTypeError, match=r"^dy: expected the dtype of x, torch\.float32, got torch\.float16"):
        call("backward_sums", dy=GOOD["dy"].half())


def test_refuses_unknown_instruction_sets():
    with pytest.raises(ValueError, match="abacus"):
        _native.use_instruction_set("abacus")
