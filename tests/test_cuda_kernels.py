"""The CUDA kernel set on emulated operations: the same calls as torch.nn.SyncBatchNorm's own, with the right arguments.

Nothing here runs on a GPU.
"""

from __future__ import annotations

import emulated_cuda
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import ACTIVATIONS
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction

import syncbn
from syncbn import functional
from syncbn._epilogue import Epilogue, activation_of
from syncbn._statistics import Running
from syncbn.comm import run_threads
from syncbn.kernels import _composed, _select, _torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors take the CUDA kernels, which are emulated; the list records the operations called."""
    return emulate(monkeypatch)


def emulate(patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(_select, "_sets", (_torch,))
    patch.setattr(_torch, "takes", lambda *tensors: True)
    return emulated_cuda.install(patch)


def whole_batch(xs: list[Tensor], gs: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    x = torch.cat(xs).double().requires_grad_()
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    y = F.batch_norm(x, None, None, w, b, True)
    (y * torch.cat(gs).double()).sum().backward()
    return y.detach(), x.grad, w.grad, b.grad


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "parameters", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.float16, torch.float32, 1e-2),
        (torch.bfloat16, torch.float32, 6e-2),
        (torch.bfloat16, torch.bfloat16, 6e-2),
    ],
)
def test_equals_the_whole_batch(
    emulated: list[str], memory_format: str, dtype: torch.dtype, parameters: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    sizes = (2, 0, 3)  # an empty replica: no mask, no branch on the device
    fmt = FORMATS[memory_format]
    xs = [torch.randn(n, 3, 5, 4).to(dtype).to(memory_format=fmt) for n in sizes]
    gs = [torch.randn(n, 3, 5, 4).to(dtype) for n in sizes]  # contiguous: another layout than x's
    weight, bias = torch.randn(3).to(parameters), torch.randn(3).to(parameters)

    def replica(comm: syncbn.comm.Communicator) -> tuple[Tensor, ...]:
        x = xs[comm.rank].clone().requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        y = functional.sync_batch_norm(x, None, None, w, b, process_group=comm)
        (y * gs[comm.rank]).sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        assert y.is_contiguous(memory_format=fmt)
        assert x.grad.is_contiguous(memory_format=fmt)
        assert w.grad.dtype == b.grad.dtype == parameters
        return y.detach(), x.grad, w.grad, b.grad

    ys, dxs, dws, dbs = zip(*run_threads(3, replica), strict=True)
    found = torch.cat(ys), torch.cat(dxs), sum(d.double() for d in dws), sum(d.double() for d in dbs)
    for ours, reference in zip(found, whole_batch(xs, gs, weight, bias), strict=True):
        scale = reference.abs().max().clamp(min=1)
        assert (ours.double() - reference).abs().max() <= tolerance * scale


def test_the_operations_called(emulated: list[str]) -> None:
    """The same as torch's, but for the gathering of statistics, which the all-reduce replaces."""
    x = torch.randn(4, 3, 5, 4, requires_grad=True)
    functional.sync_batch_norm(x).sum().backward()
    assert emulated == [
        "batch_norm_stats",
        "batch_norm_elemt",
        "batch_norm_backward_reduce",
        "batch_norm_backward_elemt",
    ]


@pytest.mark.usefixtures("emulated")
def test_the_sums_of_a_constant_channel() -> None:
    """The kernel says 0 for 1/σ there, and means a variance of 0."""
    payload = _torch.moments(torch.full((4, 1, 2), 3.0))
    assert payload.tolist() == [24.0, 72.0, 8.0]


def test_takes_no_tensor_of_the_cpu() -> None:
    assert not _torch.takes(torch.ones(2, 3))
    assert _torch.takes(None)


@pytest.mark.parametrize("count", [7, 2**31 - 1, 2**31, 2**40 + 1])
def test_more_values_than_an_int32_counts(emulated: list[str], count: int) -> None:
    """The emulation refuses a list of counts that an int32 does not hold the sum of."""
    x, dy = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double()
    mean, variance, n = torch.randn(3).double(), torch.rand(3).double() + 0.5, torch.tensor([count]).double()
    total = torch.cat([mean * n, (variance + mean.square()) * n, n])
    weight, sums = torch.randn(3).double(), torch.randn(6).double() * n
    _, statistics = _torch.normalize(x, total, Epilogue(), 0.0, None)
    torch.testing.assert_close(statistics, torch.cat([mean, variance.rsqrt(), n]), rtol=1e-12, atol=0)
    for ours, definition in (
        (
            _torch.normalize(x, total, Epilogue(weight), 0.0, None)[0],
            _composed.normalize(x, total, Epilogue(weight), 0.0, None)[0],
        ),
        (
            _torch.backward_sums(dy, x, statistics, Epilogue())[0],
            _composed.backward_sums(dy, x, statistics, Epilogue())[0],
        ),
        (
            _torch.backward_input(dy, x, statistics, Epilogue(weight), sums),
            _composed.backward_input(dy, x, statistics, Epilogue(weight), sums),
        ),
    ):
        torch.testing.assert_close(ours, definition, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
def test_activation_and_residual(
    emulated: list[str], memory_format: str, with_residual: bool, activation: nn.Module | None
) -> None:
    x, dy, residual = (torch.randn(4, 3, 5, 2).double().to(memory_format=FORMATS[memory_format]) for _ in range(3))
    weight, bias = torch.randn(3).double(), torch.randn(3).double()
    epilogue = Epilogue(weight, bias, residual.contiguous() if with_residual else None, activation_of(activation))
    results = []
    for kernels in (_torch, _composed):
        y, statistics = kernels.normalize(x, _composed.moments(x), epilogue, 1e-5, None)
        sums, dz = kernels.backward_sums(dy.contiguous(), x, statistics, epilogue)
        dz = dy if dz is None else dz
        results.append((y, sums, dz, kernels.backward_input(dz, x, statistics, Epilogue(weight), sums)))
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-11, atol=1e-11)


def test_running_statistics_move(emulated: list[str]) -> None:
    x, theirs = torch.randn(4, 3, 5), nn.BatchNorm1d(3)
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0))
    theirs(x)
    _torch.normalize(x, _torch.moments(x), Epilogue(), 1e-5, running)
    torch.testing.assert_close(running.mean, theirs.running_mean)
    torch.testing.assert_close(running.var, theirs.running_var)
    assert running.batches is not None
    assert running.batches.item() == 1


def test_a_constant_channel(emulated: list[str]) -> None:
    x = torch.randn(4, 2, 3).index_fill(1, torch.tensor(1), 8.0)
    y = functional.sync_batch_norm(x, eps=1e-5)
    assert y[:, 1].abs().max() <= 1e-6
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))


def test_nan_reaches_every_replica(emulated: list[str]) -> None:
    def replica(comm: syncbn.comm.Communicator) -> bool:
        x = torch.full((2, 1), float("nan") if comm.rank == 0 else 1.0)
        return bool(functional.sync_batch_norm(x, process_group=comm).isnan().all())

    assert run_threads(2, replica) == [True, True]


def test_the_emulation_is_strict(emulated: list[str]) -> None:
    """Negative control: arguments that ATen would refuse are refused."""
    x, wide = torch.randn(4, 3, 5).half(), torch.ones(3)
    with pytest.raises(AssertionError, match="mean"):
        torch.batch_norm_elemt(x, None, None, wide.half(), wide, 0.0)
    with pytest.raises(AssertionError, match="strides"):
        torch.batch_norm_stats(x.transpose(0, 2), 0.0)
    for count in (torch.ones(1), torch.full((2,), 2**30, dtype=torch.int32)):
        with pytest.raises(AssertionError, match="count"):
            torch.batch_norm_backward_elemt(x, x, wide, wide, None, wide, wide, count)


def _against_torch(rank: int, size: int) -> None:
    """Run torch's own autograd function and ours over the same emulated operations and real collectives."""
    patch = pytest.MonkeyPatch()
    try:
        emulate(patch)
        for fmt in FORMATS.values():
            _compare_with_torch(rank, size, fmt)
    finally:
        patch.undo()


def _compare_with_torch(rank: int, size: int, fmt: torch.memory_format) -> None:
    torch.manual_seed(rank)
    x = torch.randn(2 + rank, 3, 5, 4).to(memory_format=fmt)
    g = torch.randn_like(x)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, torchs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    syncbn.convert_sync_batchnorm(ours)
    y = ours(mine)
    reference = TorchFunction.apply(
        theirs, torchs.weight, torchs.bias, torchs.running_mean, torchs.running_var, 1e-5, 0.1, dist.group.WORLD, size
    )
    (y * g).sum().backward()
    (reference * g).sum().backward()
    for a, b in (
        (y, reference),
        (mine.grad, theirs.grad),
        (ours.weight.grad, torchs.weight.grad),
        (ours.bias.grad, torchs.bias.grad),
        (ours.running_mean, torchs.running_mean),
        (ours.running_var, torchs.running_var),
    ):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert y.stride() == reference.stride()


def test_equals_torchs_own_function_on_the_same_operations(gloo) -> None:
    gloo(2, _against_torch)
