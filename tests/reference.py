"""The oracle, torch's own batch norm on the inputs of all replicas at once, and the replicas, on threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from syncbn._epilogue import _FUNCTIONS
from syncbn.comm import Communicator, run_threads

WITHOUT_BIAS = pytest.param(
    {"bias": False},
    marks=pytest.mark.skipif(
        "bias" not in signature(nn.BatchNorm1d).parameters, reason="nn.BatchNorm of this torch has no argument bias"
    ),
)

WORLDS = [1, 2, 3, 4]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TIGHT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ACTIVATIONS = [nn.LeakyReLU(0.25) if f.module is nn.LeakyReLU else f.module() for f in _FUNCTIONS.values()]  # all
_FACTOR = {"dweight": 5, "dbias": 5, "running_mean": 0.5, "running_var": 0.5}  # of TIGHT


class Batch(NamedTuple):
    """One step's data. The loss is the sum of (y * g).sum() over the replicas: it sees every fault of a backward."""

    xs: list[Tensor]  # one per replica
    gs: list[Tensor]


class Outcome(NamedTuple):
    """What training on some batches yields."""

    y: list[Tensor]  # step by step, in each replica by replica
    dx: list[Tensor]
    dweight: list[Tensor]  # one tensor, summed over replicas and steps; none without weight
    dbias: list[Tensor]
    running_mean: list[Tensor]  # one tensor, after the last step
    running_var: list[Tensor]
    num_batches_tracked: list[Tensor]


def random_batch(
    shapes: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.float64,
    *,
    mean: float = 0,
    std: float = 1,
    seed: int = 0,
) -> Batch:
    """Draw normal inputs and upstream gradients, one of each shape."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [[torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in "xg"] for shape in shapes]
    return Batch([(x * std + mean).to(dtype) for x, _ in pairs], [g.to(dtype) for _, g in pairs])


def randomized(layer: nn.Module) -> Any:
    """Fill weight and bias with the same random numbers in every layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return layer


def to_rows(x: Tensor) -> Tensor:
    """(N, C, *) -> (values per channel, C): so replicas of any shapes can be concatenated."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def on_rows(f: Callable[[Tensor], Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Apply `f`, which keeps shapes, to the concatenation of all replicas' inputs; differentiable."""
    y = f(torch.cat([to_rows(x) for x in xs]))
    parts = y.split([x.numel() // x.shape[1] for x in xs])
    channels_last = [(x.shape[0], *x.shape[2:], x.shape[1]) for x in xs]
    return [part.reshape(shape).movedim(-1, 1) for part, shape in zip(parts, channels_last, strict=True)]


def whole_batch(*batches: Batch, **options: Any) -> Outcome:
    """Train nn.BatchNorm1d in float64 on the concatenation of all replicas' inputs: what must come out."""
    layer = randomized(nn.BatchNorm1d(batches[0].xs[0].shape[1], **options)).double()
    ys, dxs = [], []
    for batch in batches:
        xs = [x.detach().double().requires_grad_() for x in batch.xs]
        y = on_rows(layer, xs)
        sum((part * g.double()).sum() for part, g in zip(y, batch.gs, strict=True)).backward()
        ys += [part.detach() for part in y]
        dxs += [x.grad for x in xs]
    return outcome(ys, dxs, [layer])


def replicas(
    *batches: Batch,
    communicator: Callable[[Communicator], Any] = lambda comm: comm,
    input_grad: bool = True,
    **options: Any,
) -> Outcome:
    """Train SyncBatchNorm on the same batches, each replica on its own part."""
    channels = batches[0].xs[0].shape[1]

    def replica(comm: Communicator) -> tuple[nn.Module, list[tuple[Tensor, Tensor | None]]]:
        layer = randomized(SyncBatchNorm(channels, process_group=communicator(comm), **options))
        return layer, [step(layer, b.xs[comm.rank], b.gs[comm.rank], input_grad=input_grad) for b in batches]

    layers, by_replica = zip(*run_threads(len(batches[0].xs), replica), strict=True)
    by_step = [pair for pairs in zip(*by_replica, strict=True) for pair in pairs]
    return outcome([y for y, _ in by_step], [dx for _, dx in by_step if dx is not None], layers)


def step(layer: nn.Module, x: Tensor, g: Tensor, *, input_grad: bool = True) -> tuple[Tensor, Tensor | None]:
    """Run forward and backward of (y * g).sum(); return y and dx."""
    x = x.detach().requires_grad_(input_grad)
    y = layer(x)
    loss = (y * g).sum()
    if loss.requires_grad:
        loss.backward()
    return y.detach(), x.grad


def outcome(ys: list[Tensor], dxs: list[Tensor], layers: Sequence[nn.Module]) -> Outcome:
    first = layers[0]
    dparameters = [
        [] if getattr(first, name) is None else [torch.stack([getattr(layer, name).grad for layer in layers]).sum(0)]
        for name in ("weight", "bias")
    ]
    return Outcome(ys, dxs, *dparameters, *([b] if b is not None else [] for b in _statistics(first)))


def _statistics(layer: nn.Module) -> list[Tensor | None]:
    return [layer.running_mean, layer.running_var, layer.num_batches_tracked]


def assert_close(actual: Outcome, expected: Outcome, *, factor: float = 1) -> None:
    """Compare every field, in the tolerance of the dtype that came out, relative to what is large."""
    for name in Outcome._fields:
        for a, e in zip(getattr(actual, name), getattr(expected, name), strict=True):
            assert_tensor_close(a, e, factor * _FACTOR.get(name, 1), name)


def assert_tensor_close(actual: Tensor, expected: Tensor, factor: float = 1, name: str = "tensor") -> None:
    """Compare with `factor` times the tolerance of `actual`'s dtype, relative to the largest value if above 1."""
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    tolerance = factor * TIGHT.get(actual.dtype, 0.0) * largest
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


SIGNATURE = 3  # numbers that a communicator gets in addition, if it compares nothing by itself


class Recording:
    """A communicator that remembers what it was given. Only the three members of the protocol."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank = comm.rank
        self.size = max(2, comm.size)  # a world of one is not asked: here another rank adds nothing
        self.calls: list[tuple[int, torch.dtype]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append((x.numel() - SIGNATURE, x.dtype))
        return self._comm.all_reduce(x)


class Unreachable:
    """A communicator whose peers must not be called."""

    rank = 0
    size = 2

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError(f"a collective of {x.numel()} numbers")
