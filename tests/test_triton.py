"""The Triton kernels in Triton's interpreter, which runs them on the CPU; and compiled, without running, for GPUs.

Nothing here runs on a GPU. The suites of the other kernels run over these as well: SYNCBN_KERNELS=triton in
`test_the_suites_of_the_other_kernels`.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
import torch.nn.functional as F
from reference import ACTIVATIONS, Batch, assert_close, random_batch, replicas, whole_batch
from test_kernels import (
    COMPUTE_EPS,
    DTYPES,
    EPS,
    Reference,
    assert_near,
    channels_last,
    contiguous,
    identity,
    over_channel,
    packed,
    random,
    sliced,
    sliced_channels_last,
    transposed,
)

import syncbn
from syncbn._epilogue import Activation, Epilogue, activation_of
from syncbn._statistics import Running, update_running
from syncbn.comm import run_threads
from syncbn.errors import InputError, KernelsError
from syncbn.kernels import _composed, _select, _triton, composed_only, kernels_for

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
from triton import language as tl  # noqa: E402

from syncbn.kernels import _triton_code as code  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def launches(monkeypatch):
    """CPU tensors take the Triton kernels, in small tiles; the list records what is launched."""
    interpreter.small_tiles(monkeypatch)
    return interpreter.install(monkeypatch)


NAMES = ["moments", "normalize", "backward_sums", "backward_input"]
FUNCTIONS = {None: lambda z: z.clone(), **{activation_of(module): module for module in ACTIVATIONS}}
# Planes and rows; one tile and several; one program and several for each channel; widths that fill tiles and do not.
SHAPES = {
    contiguous: [(3, 2, 7), (2, 2, 67), (1, 1, 1000), (20, 2, 3, 3), (9, 17, 2, 1), (3, 2, 2, 3, 5)],
    channels_last: [(5, 1), (7, 3), (50, 9), (2, 2, 67), (20, 2, 3, 3), (9, 17, 2, 1), (3, 2, 2, 3, 5)],
}


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("number", "activation"), list(enumerate(FUNCTIONS)), ids=str)
def test_formulas(launches, number, activation, added, layout):
    """Shapes and dtypes take turns: the interpreter is slow. Another dtype for weight and bias."""
    shape = SHAPES[layout][(2 * number + added) % len(SHAPES[layout])]
    dtype, parameters = (DTYPES[(number + 2 * added + (layout is contiguous) + turn) % 4] for turn in (0, 1))
    x, dy, residual = (random(shape, dtype, mean=mean, seed=seed) for seed, mean in enumerate((0.5, -0.25, 0)))
    _test_formulas(layout(x), layout(dy), parameters, layout(residual) if added else None, activation)
    assert launches == NAMES


@pytest.mark.parametrize("layout", [sliced, sliced_channels_last, transposed])
def test_formulas_of_tensors_that_are_not_dense(launches, layout):
    x, dy, residual = (random((4, 3, 5, 6), torch.float32, seed=seed) for seed in range(3))
    _test_formulas(layout(x), dy, torch.float32, residual, Activation("relu"))
    _test_formulas(x, layout(dy), torch.float32, layout(residual), Activation("relu"))


def _test_formulas(x, dy, parameters, residual, activation):
    weight, bias = (random(x.shape[1], parameters, seed=seed) for seed in (3, 4))
    epilogue, eps = Epilogue(weight, bias, residual, activation), COMPUTE_EPS[x.dtype]
    ulps = 16 if x.dtype == torch.float64 else 4
    z = Reference(x, dy, weight.double(), bias.double()).y + (0 if residual is None else residual.double())
    expected = FUNCTIONS[activation](z.requires_grad_())
    dz = torch.autograd.grad(expected, z, dy.double())[0]
    of, size = Reference(x, dz, weight.double(), bias.double()), z.detach().abs().max() + 1

    sums, count = _triton.moments(x).tensor_split([-1])
    assert torch.equal(count, of.count)
    sizes = torch.cat([over_channel(x.abs()), over_channel(x.double().square())])
    assert_near(sums, of.total[:-1], eps * sizes, ulps)
    y, statistics = _triton.normalize(x, of.total, epilogue, EPS, None)
    torch.testing.assert_close(statistics, of.statistics, rtol=1e-14, atol=1e-16)
    assert_near(y, expected.detach(), eps * size, ulps)
    sums, ours = _triton.backward_sums(dy, x, of.statistics, epilogue)
    errors = eps * size * dy.double().abs()  # of dz, where it depends on z
    sizes = torch.cat([over_channel(errors), over_channel(errors * of.xhat.abs()) + eps])
    assert_near(sums, of.sums, sizes, ulps)
    rest = epilogue._replace(residual=None)
    if residual is None or activation is None:
        assert ours is None
    else:
        assert_near(ours, dz, eps * size * dy.abs().max(), ulps)
        assert ours.dtype == x.dtype
        dy, rest = ours, rest._replace(activation=None)
        of = Reference(x, ours, weight.double(), bias.double())
    dx = _triton.backward_input(dy, x, of.statistics, rest, of.sums)
    assert_near(dx, of.dx, eps * (of.dx.abs().max() + of.invstd.max() * size), ulps)
    assert y.dtype == dx.dtype == x.dtype
    assert y.stride() == dx.stride() == (dx if ours is None else ours).stride()
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        assert y.stride() == x.stride()


@pytest.mark.parametrize("activation", list(FUNCTIONS)[1:], ids=str)
def test_edges_of_activations(launches, activation):
    """At and next to where the pieces of a function meet, at its ends, and for NaN: what torch does."""
    z = torch.tensor(
        [-torch.inf, -1e38, -100, -3.001, -3, -2.999, -0.0, 0, 1e-30, 2.999, 3, 3.001, 100, torch.inf, torch.nan]
    )
    z = z.repeat(16)  # in what is left over from torch's vectors, hardswish's gradient is not NaN for NaN
    x, dy = z.view(-1, 1, 1), torch.full((len(z), 1, 1), 1.5)
    dy[x == z[3]] = torch.nan  # times 0 would be NaN
    epilogue, of = Epilogue(None, None, torch.zeros_like(x), activation), torch.tensor([0.0, 1, 1]).double()
    y, _ = _triton.normalize(x, identity(1), epilogue, 0.0, None)
    _, dz = _triton.backward_sums(dy, x, of, epilogue)
    dx = _triton.backward_input(dy, x, of, epilogue._replace(residual=None), torch.zeros(2).double())
    expected = FUNCTIONS[activation](x.requires_grad_())
    gradient = torch.autograd.grad(expected, x, dy)[0]
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    torch.testing.assert_close(dz, gradient, equal_nan=True)
    finite = z.isfinite()
    torch.testing.assert_close(dx[finite], gradient[finite], equal_nan=True)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("first", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_means_do_not_cancel(launches, dtype, first, layout):
    """mean/std = 1e4, whatever the first values of each channel, which are in the first tile, are."""
    x = random((4, 2, 9, 11), dtype, mean=1e4)
    x[:, :, 0, :2] = first
    x = layout(x)
    of = Reference(x, x, None, None)
    s1, s2 = (_triton.moments(x)[:-1] / of.count).chunk(2)
    assert ((s1 - of.mean).abs() <= 1e-7 / of.invstd).all()
    rtol = 1e-6 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(s2 - s1.square(), of.invstd**-2 - EPS, rtol=rtol, atol=0)
    y, _ = _triton.normalize(x, of.total, Epilogue(), EPS, None)
    assert_near(y, of.y, COMPUTE_EPS[dtype] * of.y.abs().max(), 4)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_infinities_and_nans_stay_in_their_channels(launches, layout):
    x = random((2, 5, 70), torch.float32)
    clean = _triton.moments(layout(x))[:-1].view(2, -1)
    for channel, value in [(1, torch.inf), (2, -torch.inf), (4, torch.nan)]:
        x[-1, channel, -1] = value
    sums = _triton.moments(layout(x))[:-1].view(2, -1)
    assert not sums[:, [1, 2, 4]].isfinite().any()
    assert torch.equal(sums[:, [0, 3]], clean[:, [0, 3]])
    total = torch.cat([clean.flatten(), torch.tensor([140.0]).double()])
    total[3] = torch.nan
    y, statistics = _triton.normalize(layout(random((2, 5, 70), torch.float32)), total, Epilogue(), EPS, None)
    assert y[:, 3].isnan().all()
    assert statistics[[3, 8]].isnan().all()
    assert y[:, [0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_comes_back(monkeypatch, dtype):
    interpreter.install(monkeypatch)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(2, 1, 2**15)
    total = packed(torch.zeros(1).double(), torch.full((1,), 2.0).double(), 2)
    y, _ = _triton.normalize(x, total, Epilogue(), 0.0, None)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~y.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0), (2, 3, 0, 5)], ids=str)
def test_empty_replicas(launches, shape):
    """No values here, but 8 elsewhere: statistics move all the same."""
    x = torch.empty(shape)
    assert torch.equal(_triton.moments(x), torch.zeros(7).double())
    of, zeros = torch.ones(7).double(), torch.zeros(6).double()
    for epilogue in (Epilogue(), Epilogue(None, None, x), Epilogue(None, None, None, Activation("relu"))):
        sums, dz = _triton.backward_sums(x, x, of, epilogue)
        assert torch.equal(sums, zeros)
        assert dz is None
    epilogue = Epilogue(torch.ones(3), torch.ones(3), x, Activation("silu"))
    sums, dz = _triton.backward_sums(x, x, of, epilogue)
    assert torch.equal(sums, zeros)
    total = packed(torch.full((3,), 8.0).double(), torch.full((3,), 40.0).double(), 8)
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.5)
    y, statistics = _triton.normalize(x, total, epilogue, 0.0, running)
    dx = _triton.backward_input(x, x, statistics, epilogue._replace(residual=None), zeros)
    assert y.shape == dz.shape == dx.shape == shape
    assert torch.equal(statistics, packed(torch.ones(3).double(), torch.full((3,), 0.5).double(), 8))
    assert running.mean.tolist() == [0.5] * 3
    torch.testing.assert_close(running.var, torch.full((3,), 0.5 + 0.5 * 4 * 8 / 7))
    assert running.batches.item() == 1
    assert launches == ["normalize"]


def test_results_are_the_same_bits_whichever_program_is_the_last(launches, monkeypatch):
    """Programs in another order than the interpreter's: the shares are added up in the order of the splits."""
    x = random((6, 2, 70), torch.float32, mean=3)
    epilogue = Epilogue(None, None, x, Activation("silu"))
    straight = _triton.moments(x), *_triton.backward_sums(x, x, torch.ones(5).double(), epilogue)
    work = _triton.divide(x.shape, False)
    assert work.splits > 2
    builder = triton.runtime.interpreter.interpreter_builder
    place, last = builder.set_grid_idx, work.blocks * work.splits - 1
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(last - x, y, z))
    assert torch.equal(_triton.moments(x), straight[0])
    sums, dz = _triton.backward_sums(x, x, torch.ones(5).double(), epilogue)
    assert torch.equal(sums, straight[1])
    assert torch.equal(dz, straight[2])


def test_tickets_are_left_at_0(launches):
    for shape in [(50, 2, 3), (9, 3), (2, 40, 7)]:
        x = random(shape, torch.float32)
        _triton.moments(x)
        _triton.backward_sums(x, x, torch.ones(2 * shape[1] + 1).double(), Epilogue())
        assert not _triton._kept[-1, 0].any()


RUNNING = {
    "a number": (0.3, True),
    "a tensor": (torch.tensor(0.3, dtype=torch.float64), True),
    "averages": (None, True),
    "no count": (0.3, False),
    "averages without a count": (None, False),
}


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("count", [8, 0, -1])
def test_running_statistics_move_as_the_definition_says(launches, kind, count):
    """Many channels: more than the program does at a time; NaN and infinity where nothing may move."""
    momentum, counted = RUNNING[kind]
    x = torch.empty(0, 300)  # of an empty replica, all of whose work this is
    total = packed(random(300, torch.float64), random(300, torch.float64).abs() + 20, count)
    for dtype in DTYPES:
        mean, var = random(300, dtype, seed=2), random(300, dtype, seed=3).abs().repeat_interleave(2)[::2]
        if count <= 0:
            mean[0], var[1] = torch.inf, torch.nan
        ours = Running(mean.clone(), var, torch.tensor(4) if counted else None, momentum)
        theirs = Running(mean.clone(), var.clone(), torch.tensor(4) if counted else None, momentum)
        versions = [t._version for t in ours[:3] if t is not None]
        _triton.normalize(x, total, Epilogue(), EPS, ours)
        update_running(theirs, total)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
            assert count > 0 or torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        if counted:
            assert ours.batches.item() == theirs.batches.item()
            assert all(t._version > before for t, before in zip(ours[:3], versions, strict=True))


def test_momentum_on_the_device_is_not_read_back(launches, monkeypatch):
    def refuse(self):
        raise AssertionError("read back")

    momentum, total = torch.tensor(0.25), packed(torch.ones(3).double(), torch.full((3,), 5.0).double(), 2)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    monkeypatch.setattr(_triton, "refuse_total", lambda total: None)
    running = Running(torch.zeros(3), None, None, momentum)
    _triton.normalize(torch.ones(2, 3), total, Epilogue(), EPS, running)
    assert running.mean.tolist() == [0.125] * 3


def test_one_value_has_no_variance(launches):
    running = Running(torch.ones(2), torch.ones(2), torch.tensor(0))
    with pytest.raises(InputError, match="more than 1 value"):
        _triton.normalize(torch.zeros(1, 2), _triton.moments(torch.zeros(1, 2)), Epilogue(), EPS, running)
    assert [t.tolist() for t in running[:3]] == [[1, 1], [1, 1], 0]


# Replicas.
BATCHES = {
    "2-D": ([(4, 3), (2, 3)], torch.float64, {}),
    "4-D": ([(2, 3, 4, 4), (1, 3, 4, 4), (0, 3, 4, 4)], torch.float32, {}),
    "5-D without parameters": ([(2, 2, 2, 2, 3)] * 2, torch.float64, {"affine": False}),
    "averages": ([(3, 2, 5)] * 2, torch.float64, {"momentum": None}),
    "not tracked": ([(3, 2, 5)] * 2, torch.float32, {"track_running_stats": False}),
    "half": ([(4, 2, 5)] * 2, torch.bfloat16, {}),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_replicas_equal_the_whole_batch(launches, kind):
    shapes, dtype, options = BATCHES[kind]
    batches = [random_batch(shapes, dtype, mean=3, std=2, seed=seed) for seed in range(2 if kind == "averages" else 1)]
    assert_close(replicas(*batches, dtype=dtype, **options), whole_batch(*batches, dtype=dtype, **options), factor=2)
    assert set(launches) == set(NAMES)


def test_replicas_in_channels_last(launches):
    xs, gs = random_batch([(2, 3, 4, 4)] * 2, torch.float64)
    batch = Batch([x.to(memory_format=torch.channels_last) for x in xs], gs)
    assert_close(replicas(batch, dtype=torch.float64), whole_batch(batch, dtype=torch.float64))


@pytest.mark.parametrize("activation", list(FUNCTIONS)[1:3], ids=str)
def test_replicas_with_activation_and_residual(launches, activation):
    """relu(norm(x) + residual) over two replicas, one of them in channels_last, and all of its gradients."""
    x, residual, dy = (random((4, 3, 5, 2), torch.float64, seed=seed) for seed in range(3))
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    expected = FUNCTIONS[activation](F.batch_norm(leaves[0], None, None, training=True) + leaves[1])
    expected.backward(dy)

    def replica(comm):
        half, layout = slice(2 * comm.rank, 2 * comm.rank + 2), (contiguous, channels_last)[comm.rank]
        own = [layout(t[half]).requires_grad_() for t in (x, residual)]
        y = syncbn.SyncBatchNorm(3, process_group=comm, dtype=torch.float64, activation=activation)(*own)
        y.backward(dy[half])
        return y.detach(), own[0].grad, own[1].grad

    results = [torch.cat(pair) for pair in zip(*run_threads(2, replica), strict=True)]
    for ours, theirs in zip(results, (expected.detach(), *(t.grad for t in leaves)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert sorted(launches) == sorted(2 * NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_kernel_is_seen(launches, monkeypatch, name):
    """Negative control: the comparison above fails when one kernel's result is off by a thousandth."""
    kernel = getattr(_triton, name)

    def wrong(*arguments):
        result = kernel(*arguments)
        return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(_triton, name, wrong)
    batch = random_batch([(4, 3, 5)] * 2, torch.float64)
    with pytest.raises(AssertionError):
        assert_close(replicas(batch, dtype=torch.float64), whole_batch(batch, dtype=torch.float64))


# Which kernels.


def named(monkeypatch, setting):
    monkeypatch.setattr(_select, "_sets", None)
    monkeypatch.setattr(_select, "_named", "")
    monkeypatch.setenv("SYNCBN_KERNELS", setting)


def test_the_environment_asks_for_the_interpreter():
    code = (
        "import torch\nfrom syncbn.kernels import kernels_for, _triton, _composed\nx = torch.ones(2, 3)\n"
        "assert kernels_for(x) is _triton\nassert _triton.moments(x).tolist() == [2] * 7\n"
        "assert kernels_for(x.to('meta')) is kernels_for(torch._neg_view(x)) is _composed"
    )
    environment = {**os.environ, "SYNCBN_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=50)


@pytest.mark.parametrize("setting", ["cuda", "Triton", "composed "])
def test_an_unknown_name_is_an_error(monkeypatch, setting):
    named(monkeypatch, setting)
    for _ in range(2):  # not only the first time
        with pytest.raises(KernelsError, match=rf"SYNCBN_KERNELS={setting} .*compiled.*triton.*torch.*composed"):
            kernels_for(torch.ones(2, 3))


@pytest.mark.parametrize("setting", ["triton", "compiled"])
def test_what_is_not_installed_is_an_error(monkeypatch, setting):
    named(monkeypatch, setting)
    monkeypatch.setattr(_select, "native", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "syncbn.kernels._triton_code")
    monkeypatch.delattr(syncbn.kernels, "_triton_code")
    _triton._code.cache_clear()
    with pytest.raises(KernelsError, match=rf"(?s)SYNCBN_KERNELS={setting}: .*install.*composed"):
        kernels_for(torch.ones(2, 3))
    _triton._code.cache_clear()


@pytest.mark.parametrize("setting", ["triton", "torch"])
def test_kernels_of_another_device_are_an_error_before_any_collective(monkeypatch, setting):
    named(monkeypatch, setting)
    monkeypatch.delenv("TRITON_INTERPRET")
    _triton._serves.cache_clear()
    batch = random_batch([(4, 3)] * 2)
    with pytest.raises(KernelsError, match=rf"SYNCBN_KERNELS={setting}: .*cpu, where the input is.*compiled"):
        replicas(batch)
    assert kernels_for(torch._neg_view(torch.ones(2, 3))) is _composed  # more than memory: no kernels are for it
    with composed_only():
        assert kernels_for(torch.ones(2, 3)) is _composed


@pytest.mark.parametrize("setting", ["compiled", "composed", ""])
def test_names_that_serve_the_cpu(monkeypatch, setting):
    named(monkeypatch, setting)
    x = torch.ones(2, 3)
    assert (kernels_for(x) is _composed) == (setting == "composed")
    assert kernels_for(x.to("meta")) is _composed


def test_a_gpu_that_triton_cannot_use_is_left_to_torchs_kernels(monkeypatch, caplog):
    """Here it is a CUDA device that does not exist."""
    _triton._serves.cache_clear()
    assert not _triton._serves(torch.device("cuda", 0))
    assert "no Triton kernels on cuda:0" in caplog.text
    _triton._serves.cache_clear()
    assert not _triton.takes(torch.ones(3))
    assert not _triton.takes(None)


@triton.jit
def last_value(result, where, outer, inner, channels, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr):
    number, block = tl.load(where), tl.load(where + 1)
    offsets, inside, count = code._place(number, block, outer, inner, channels, rows, lines, columns)
    tl.store(result, tl.max(tl.max(tl.where(inside, offsets, 0), 1), 0))
    tl.store(result + 1, count)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [(2**30, 4, 256), (2**30 + 3, 5, 210)], ids=str)
def test_offsets_beyond_int32(launches, rows, shape):
    """Where the last value of a tensor of 2⁴⁰ lies, and how many its tile has: exact, without such a tensor."""
    outer, inner, channels, _ = _triton.divide(torch.Size(shape), rows).sizes
    lines, columns = (16, 4) if rows else (4, 16)
    tiles = -(-outer // lines) * -(-inner // columns)
    result, last_block = torch.zeros(2, dtype=torch.int64), (channels - 1) // columns if rows else channels - 1
    last_value[(1,)](
        result, torch.tensor([tiles - 1, last_block]), outer, inner, channels, rows=rows, lines=lines, columns=columns
    )
    assert result[0] == math.prod(shape) - 1
    assert result[1] == ((outer - 1) % lines + 1) * (1 if rows else (inner - 1) % columns + 1)


# The real compiler, in processes of their own: here, Triton is the interpreter.
WITHOUT_INTERPRETER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def compiler(*arguments, seconds=55):
    return subprocess.run(
        [sys.executable, *arguments], check=False, cwd=ROOT, env=WITHOUT_INTERPRETER, capture_output=True, text=True,
        timeout=seconds,
    )  # fmt: skip


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(["cuda:90"], id="sm_90"),
        pytest.param(["cuda:80", "hip:gfx942"], id="sm_80 and gfx942", marks=pytest.mark.launcher),
    ],
)
def test_kernels_compile_without_spills(targets):
    """A few of those that the library launches; the script has all."""
    job = compiler("benchmarks/triton_specialisations.py", "--quick", "--target", *targets, seconds=90)
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("12 specialisations") == job.stdout.count("0 with spills") == len(targets)


WHAT_WAS_COMPILED = r"""
import re
from benchmarks.triton_specialisations import GPUTarget, Specialisation, compiled, needs

target = GPUTarget("cuda", 80, 32)
assert needs(compiled(Specialisation("backward_sums", "fp32", False, 1024), target, maxnreg=24), target).spills > 0


def loads(ptx):
    return len(re.findall(r"ld\.global\S*\.v4", ptx))


fusing = {"activation": "silu", "residual": True}
for kernel, fused in (("moments", {}), ("backward_sums", {}), ("backward_sums", fusing)):
    for rows, columns in ((False, 1024), (True, 64)):
        ptx = compiled(Specialisation(kernel, "bf16", rows, columns, **fused), target).asm["ptx"]
        # all floating additions across programs are made by one of them, in order: the only atomic is the ticket
        atomics = re.findall(r"\b(?:atom|red)\.\S+", ptx)
        assert atomics == ["atom.global.gpu.acq_rel.add.u32"], atomics
        before, after = ptx.split("atom.global.gpu.acq_rel.add.u32")
        assert "bar.sync" in before[before.rindex("st.global"):], "shares are stored, then a barrier, then the ticket"
        assert "bar.sync" in after[: after.index("ld.global")], "the ticket, then a barrier, then the shares of others"
        assert "ld.global.cg" in after and ".v4" in before, "wide loads"
        assert not fused or re.search(r"st\.global\S*\.v4", before), "wide stores of dz"

# a residual is one tensor more to read, and an activation none
for kernel in ("normalize", "backward_sums"):
    plain, activated, both = (
        compiled(Specialisation(kernel, "fp32", False, 1024, activation=name, residual=added), target).asm["ptx"]
        for name, added in (("", False), ("relu", False), ("relu", True))
    )
    tensors = {"normalize": 1, "backward_sums": 2}[kernel]
    assert loads(plain) == loads(activated) == tensors * (loads(both) - loads(plain)) > 0, kernel

ptx = compiled(Specialisation("normalize", "bf16", False, 1024, "bf16", "bf16"), target).asm["ptx"]
assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx) and not re.search(r"cvt\.r[zmp]\S*bf16", ptx), "rounds to nearest"
assert not re.search(r"\batom|\bred\.", ptx)
"""


@pytest.mark.launcher
def test_what_was_compiled():
    """Spills are seen; the order of stores, barrier and ticket; how halves are rounded."""
    job = compiler("-c", WHAT_WAS_COMPILED)
    assert job.returncode == 0, job.stderr


@pytest.mark.launcher
def test_launches():
    """At most 3 a direction, with relu or without, and no more than torch.nn.SyncBatchNorm's; Triton's own launcher."""
    job = compiler("benchmarks/launches.py", "--repeat", "10")
    assert job.returncode == 0, job.stderr
    rows = [line.split() for line in job.stdout.splitlines()[1:]]
    ours, _, torchs, fused, _, torchs_and_relu = ((int(row[-3]), int(row[-2])) for row in rows)
    assert 2 <= ours[0] <= 3
    assert 2 <= ours[1] <= 3
    assert fused == ours
    assert ours[0] < torchs[0] < torchs_and_relu[0]
    assert ours[1] <= torchs[1] < torchs_and_relu[1]


WHAT_IS_LAUNCHED = r"""
import itertools, torch
from benchmarks.launches import Driver, given, triton
from syncbn._epilogue import Activation, Epilogue
from syncbn._statistics import Running
from syncbn.kernels import _triton

triton.runtime.driver.set_active(Driver())
torch.version.cuda = "12.8"  # as the driver says: what is compiled for CUDA alone is then given, too
_triton.refuse_total = lambda total: None
x, total, kept = torch.randn(8, 16, 4, 4), torch.ones(33).double(), torch.zeros(16)
for weight, momentum, batches, mean in itertools.product(
    (None, torch.ones(16)), (0.3, 1, torch.tensor(0.3), None), (None, torch.tensor(0)), (None, kept)
):
    _triton.normalize(x, total, Epilogue(weight, weight), 1e-5, Running(mean, mean, batches, momentum))
    last = given[-1]
    average = momentum is None and batches is not None
    assert last["eps"] == 1e-5 and isinstance(last["momentum"], float), last
    assert last["momentum"] == (float(momentum) if isinstance(momentum, float | int) else 0), last
    assert (last["momentum_at"] is not None) == isinstance(momentum, torch.Tensor)
    assert last["average"] == average
    assert (last["running_mean"] is not None) == (mean is not None and (average or momentum is not None)), last
    assert (last["weight"] is None) == (weight is None)
for x in (x, x.to(memory_format=torch.channels_last), x[:, :, :3, :3].contiguous(), x.flatten(1)):
    channels = x.shape[1]
    of, weight = torch.ones(2 * channels + 1).double(), torch.ones(channels)
    for activation, residual in ((None, None), (None, x), (Activation("relu"), None), (Activation("leaky_relu", 1), x)):
        epilogue = Epilogue(weight, weight, residual, activation)
        given.clear()
        _triton.moments(x)
        _triton.normalize(x, of, epilogue, 1e-5, None)
        _, dz = _triton.backward_sums(x, x, of, epilogue)
        _triton.backward_input(x, x, of, epilogue._replace(residual=None), of[:-1])
        assert (dz is None) == (residual is None or activation is None)
        assert len(given) == 4
        for last in given:
            values = last["outer"] * last["inner"] * last["channels"]
            assert values == x.numel() and last["channels"] == channels, last
        for last in given[1:]:
            assert last["activation"] == (activation and activation.name), last
            assert last["slope"] == (activation.slope if activation else 0) and isinstance(last["slope"], float), last
        assert given[1]["residual"] is residual
        assert given[2]["residual"] is (dz if dz is None else residual) and given[2]["dz"] is dz
        assert all((last["bias"] is None) == (activation is None) for last in given[2:])
"""


@pytest.mark.launcher
def test_what_is_launched():
    """Each kind of argument, through Triton's own launcher, which is particular about types."""
    job = compiler("-c", WHAT_IS_LAUNCHED)
    assert job.returncode == 0, job.stderr


@pytest.mark.launcher
@pytest.mark.timeout(600)
def test_the_suites_of_the_other_kernels():
    """In a process whose only kernels are these; without what takes the interpreter minutes, or is above with less."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SYNCBN_KERNELS": "triton"}
    chosen = "triton and not (formulas or large_means or contiguous or halves_are_rounded or SiLU)"
    suites = ["tests/test_kernels.py", "tests/test_equivalence.py"]
    job = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *suites],
        check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", job.stdout)[1]) > 100
