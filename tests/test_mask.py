"""Statistics over what is valid: equal to the valid values of all replicas alone, and to autograd of the definition."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import (
    ACTIVATIONS,
    FLOATS,
    WORLDS,
    Batch,
    Recording,
    Unreachable,
    assert_tensor_close,
    random_batch,
    randomized,
    to_rows,
)
from test_autograd import CHANNELS, Together, arguments_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import syncbn
import syncbn._statistics
from syncbn import SyncBatchNorm, convert_sync_batchnorm, valid_positions
from syncbn._epilogue import Epilogue
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import ConversionError, DTypeError, InputError
from syncbn.functional import sync_batch_norm
from syncbn.kernels import _composed, composed_only

BOTH = pytest.mark.parametrize("kernels", [contextlib.nullcontext, composed_only], ids=["native", "composed"])
SHAPES = [(5, 3), (4, 3, 6), (2, 3, 4, 5), (1, 3, 2, 3, 4), (0, 3)]


def random_masks(batch: Batch, *, weights: bool = False, flat: bool = False) -> list[Tensor]:
    """Masks with other numbers of valid values on each replica; or weights, a third of which are 0."""
    generator = torch.Generator().manual_seed(7)
    masks = []
    for rank, x in enumerate(batch.xs):
        w = torch.rand(x.shape[0], 1, *x.shape[2:], generator=generator, dtype=torch.float64)
        mask = 1.5 * (w - 0.3).clamp(min=0) if weights else w < 0.3 + 0.15 * rank
        masks.append(mask.squeeze(1) if flat else mask)
    return masks


def rows_of(mask: Tensor | None, x: Tensor) -> Tensor:
    """The weight of each row of `to_rows(x)`, (M, 1) float64."""
    if mask is None:
        return torch.ones(x.numel() // x.shape[1], 1, dtype=torch.float64)
    return mask.double().reshape(-1, 1)


def definition(x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Masked batch norm of rows (M, C) with weights (M, 1), as one writes it down."""
    mean = (w * x).sum(0) / w.sum()
    variance = (w * (x - mean).square()).sum(0) / w.sum()
    return weight * (x - mean) / (variance + eps).sqrt() + bias


class Outcome:
    """What one step of training yields: rows of y and dx of all replicas, the sums of the parameters' gradients."""

    def __init__(self, ys: list[Tensor], dxs: list[Tensor], layers: list[Any]) -> None:
        self.y, self.dx = (torch.cat([to_rows(t) for t in ts]) for ts in (ys, dxs))
        self.dweight, self.dbias = (
            torch.stack([getattr(layer, name).grad for layer in layers]).sum(0) for name in ("weight", "bias")
        )
        self.running = [[layer.running_mean, layer.running_var] for layer in layers]


def train(batch: Batch, masks: list[Tensor | None], world: Callable[[Any], Any] = lambda comm: comm) -> Outcome:
    """Run one step of a layer on threads."""

    def replica(comm: Any) -> tuple[Tensor, Tensor, SyncBatchNorm]:
        layer = randomized(SyncBatchNorm(batch.xs[0].shape[1], process_group=world(comm), dtype=torch.float64))
        x = batch.xs[comm.rank].detach().requires_grad_()
        y = layer(x, mask=masks[comm.rank])
        (y * batch.gs[comm.rank]).sum().backward()
        return y.detach(), x.grad, layer

    return Outcome(*map(list, zip(*run_threads(len(batch.xs), replica), strict=True)))


def whole(x: Tensor, g: Tensor) -> Outcome:
    """The same by nn.BatchNorm1d on rows, all of which count."""
    layer = randomized(nn.BatchNorm1d(x.shape[1])).double()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * g).sum().backward()
    return Outcome([y.detach()], [x.grad], [layer])


def rows(batch: Batch, masks: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """x, g (M, C) and weights (M, 1) of all replicas."""
    x, g = (torch.cat([to_rows(t).double() for t in ts]) for ts in batch)
    return x, g, torch.cat([rows_of(mask, x) for mask, x in zip(masks, batch.xs, strict=True)])


def assert_same_parameters_and_statistics(ours: Outcome, expected: Outcome) -> None:
    for running in ours.running:
        for buffer, other in zip(running, expected.running[0], strict=True):
            assert_tensor_close(buffer, other)
    assert_tensor_close(ours.dweight, expected.dweight)
    assert_tensor_close(ours.dbias, expected.dbias)


# The valid values of all replicas alone


@BOTH
@pytest.mark.parametrize("flat", [False, True], ids=["(N, 1, *)", "(N, *)"])
@pytest.mark.parametrize("world", WORLDS)
def test_it_is_batch_norm_of_the_valid_values(world, flat, kernels):
    """Also of unequal shapes and an empty replica, with a loss that does not use the others; those may be anything."""
    batch = random_batch(SHAPES[-world:] if world > 1 else [(4, 3, 6)], mean=3)
    masks = random_masks(batch, flat=flat)
    x, g, w = rows(batch, masks)
    valid = w[:, 0] > 0
    junk = itertools.cycle([torch.nan, torch.inf, -torch.inf, 1e300, 0.0])
    junk_batch = Batch(
        [
            torch.where(m.view(x.shape[0], 1, *x.shape[2:]), x, torch.full_like(x, next(junk)))
            for x, m in zip(batch.xs, masks, strict=True)
        ],
        [g * m.view(g.shape[0], 1, *g.shape[2:]) for g, m in zip(batch.gs, masks, strict=True)],
    )
    with kernels():
        ours = train(junk_batch, masks)
    expected = whole(x[valid], g[valid])
    assert_tensor_close(ours.y[valid], expected.y)
    assert_tensor_close(ours.dx[valid], expected.dx)
    assert not ours.dx[~valid].any()
    assert_same_parameters_and_statistics(ours, expected)


@pytest.mark.parametrize("world", [1, 3])
def test_integer_weights_are_repetitions(world):
    batch = random_batch(SHAPES[1:4][:world])
    masks = [(3 * m).round() for m in random_masks(batch, weights=True)]
    x, g, w = rows(batch, masks)
    assert set(w.unique().tolist()) == {0, 1, 2, 3}
    times = w[:, 0].long()
    ours = train(Batch(batch.xs, [g * (m > 0) for g, m in zip(batch.gs, masks, strict=True)]), masks)
    expected = whole(x.repeat_interleave(times, 0), (g / w).repeat_interleave(times, 0))
    assert_tensor_close(ours.y.repeat_interleave(times, 0), expected.y)
    repeated = torch.zeros_like(x).index_add_(0, torch.arange(len(x)).repeat_interleave(times), expected.dx)
    assert_tensor_close(ours.dx, repeated)
    assert_same_parameters_and_statistics(ours, expected)


def test_no_mask_is_a_mask_of_ones_also_among_others():
    batch = random_batch(SHAPES[:4])
    masks = random_masks(batch, weights=True)
    for given in ([None] * 4, [*masks[:2], None, None]):
        ones = [torch.ones_like(m) if g is None else g for m, g in zip(masks, given, strict=True)]
        ours, expected = train(batch, given), train(batch, ones)
        assert_tensor_close(ours.y, expected.y)
        assert_tensor_close(ours.dx, expected.dx)
        assert_same_parameters_and_statistics(ours, expected)


def test_local_valid_values_are_not_enough():
    """Negative control: means of the replicas' means, and a mask that is not heard, differ."""
    batch = random_batch(SHAPES[1:4], mean=3)
    masks = random_masks(batch)
    ours = train(batch, masks)
    for other in (train(batch, masks, lambda _: syncbn.comm.SingleProcess()), train(batch, [None] * 3)):
        with pytest.raises(AssertionError):
            assert_tensor_close(ours.y, other.y)


# Autograd of the definition


@BOTH
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
def test_gradients_are_those_of_the_definition(activation, has_residual, channels_last, kernels):
    """Every position has a gradient, also where the weight is 0."""
    batch, (residuals, _) = (random_batch([(2, 3, 4, 5), (1, 3, 4, 2), (3, 3, 1, 4)], seed=seed) for seed in range(2))
    masks = random_masks(batch, weights=True)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    parameters = randomized(nn.BatchNorm1d(3)).double()

    def replica(comm):
        x, residual = (ts[comm.rank].contiguous(memory_format=memory_format) for ts in (batch.xs, residuals))
        leaves = [t.detach().clone().requires_grad_() for t in (x, parameters.weight, parameters.bias, residual)]
        y = sync_batch_norm(
            leaves[0], None, None, *leaves[1:3], process_group=comm, activation=activation,
            residual=leaves[3] if has_residual else None, mask=masks[comm.rank],
        )  # fmt: skip
        (y * batch.gs[comm.rank]).sum().backward()
        assert y.is_contiguous(memory_format=memory_format)
        assert leaves[0].grad.is_contiguous(memory_format=memory_format)
        return y.detach(), *(leaf.grad for leaf in leaves)

    with kernels():
        ys, dxs, dweights, dbiases, dresiduals = zip(*run_threads(3, replica), strict=True)
    x, g, w = rows(batch, masks)
    leaves = [t.detach().requires_grad_() for t in (x, parameters.weight, parameters.bias, rows_in(residuals))]
    z = definition(leaves[0], w, *leaves[1:3]) + (leaves[3] if has_residual else 0)
    y = z if activation is None else activation(z)
    (y * g).sum().backward()
    assert_tensor_close(rows_in(ys), y)
    assert_tensor_close(rows_in(dxs), leaves[0].grad)
    assert_tensor_close(sum(dweights), leaves[1].grad)
    assert_tensor_close(sum(dbiases), leaves[2].grad)
    if has_residual:
        assert_tensor_close(rows_in(dresiduals), leaves[3].grad)


def rows_in(tensors) -> Tensor:
    return torch.cat([to_rows(t) for t in tensors])


MASKS_OF = {(3, 2): [1.0, 0, 0.7], (1, 2, 2): [[1.0, 2.5]], (2, 2): [0.0, 1], (0, 2): [], (1, 2): [0.0]}


def normalise(comm, x, weight, bias):
    mask = None if comm.rank == 2 else torch.tensor(MASKS_OF[tuple(x.shape)], dtype=torch.float64)
    return [sync_batch_norm(x, None, None, weight, bias, process_group=comm, mask=mask)]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("shapes", [[(3, 2)], [(3, 2), (1, 2, 2)], [(3, 2), (0, 2), (1, 2)]], ids=str)
def test_gradcheck(shapes, check):
    assert check(lambda *t: Together.apply(normalise, len(shapes), *t), arguments_of(shapes))


def test_gradgradcheck_through_activation_and_residual():
    shapes = [(3, 2), (2, 2)]

    def normalise(comm, x, weight, bias, residual):
        mask = torch.tensor(MASKS_OF[tuple(x.shape)], dtype=torch.float64)
        return [
            sync_batch_norm(
                x, None, None, weight, bias, process_group=comm, activation="silu", residual=residual, mask=mask
            )
        ]

    residuals, _ = random_batch(shapes, seed=3)
    tensors = [*arguments_of(shapes), *(residual.requires_grad_() for residual in residuals)]
    assert torch.autograd.gradgradcheck(lambda *t: Together.apply(normalise, len(shapes), *t), tensors)


def test_nan_outside_has_no_part_in_second_derivatives():
    x, mask = torch.randn(6, CHANNELS, dtype=torch.float64), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    penalties = []
    for values, valid in ((x, mask), (x[mask], None)):
        leaf = values.clone()
        if valid is not None:
            leaf[~valid] = torch.tensor([torch.nan, torch.inf]).double()[:, None]
        leaf.requires_grad_()
        y = sync_batch_norm(leaf, mask=valid)
        y = y if valid is None else y[valid]
        (dx,) = torch.autograd.grad(y.tanh().square().sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    ours, expected = penalties
    assert not ours[~mask].any()
    torch.testing.assert_close(ours[mask], expected, rtol=1e-10, atol=1e-10)


# Precision


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype_of_mask", [torch.bool, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype, dtype_of_mask, channels_last):
    shape, memory_format = (4, 3, 6, 5), torch.channels_last if channels_last else torch.contiguous_format
    batch = random_batch([shape] * 2, dtype, mean=2)
    masks = [m.to(dtype_of_mask) for m in random_masks(batch)]
    ours = train(Batch([x.contiguous(memory_format=memory_format) for x in batch.xs], batch.gs), masks)
    x, g, w = rows(batch, masks)
    x.requires_grad_()
    layer = randomized(nn.BatchNorm1d(3)).double()
    y = definition(x, w, layer.weight, layer.bias)
    (y * g).sum().backward()
    assert ours.y.dtype == ours.dx.dtype == dtype
    assert_tensor_close(ours.y, y.detach(), factor=2)
    assert_tensor_close(ours.dx, x.grad, factor=2)


def test_a_mean_far_from_zero():
    batch = random_batch([(64, 3, 8)] * 2, torch.float32, mean=1e4)
    masks = random_masks(batch, weights=True)
    ours = train(batch, masks)
    x, _, w = rows(batch, masks)
    layer = randomized(nn.BatchNorm1d(3)).double()
    expected = definition(x, w, layer.weight, layer.bias).detach()
    assert_tensor_close(ours.y, expected, factor=2)


def test_counts_are_exact():
    """A float32 sum of ones ends at 2²⁴."""
    x = torch.zeros(1, 1, 1).expand(1, 1, 2**24 + 1)
    assert _composed.moments(x, torch.ones(1, 1, 1).expand(1, 1, 2**24 + 1))[-1].item() == 2**24 + 1


# The schedule


def test_one_collective_each_way():
    recordings = {}

    def recording(comm):
        recordings[comm.rank] = Recording(comm)
        return recordings[comm.rank]

    batch = random_batch(SHAPES[:3])
    masks = random_masks(batch)
    train(batch, [masks[0], None, torch.zeros_like(masks[2])], recording)
    assert [r.calls for r in recordings.values()] == [[(7, torch.float64), (6, torch.float64)]] * 3


# Bad masks


def bad_masks() -> dict[str, tuple[Tensor, type[Exception], str]]:
    good = torch.ones(4, 1, 5)
    return {
        "channels": (torch.ones(4, 3, 5), InputError, r"mask of shape \(4, 1, 5\) or \(4, 5\).*got \(4, 3, 5\)"),
        "broadcast": (torch.ones(1, 1, 5), InputError, "expected mask of shape"),
        "lengths": (torch.ones(4), InputError, "expected mask of shape"),
        "int": (good.long(), DTypeError, r"mask as bool or floating.*got torch.int64: pass mask.bool\(\)"),
        "device": (torch.ones(4, 1, 5, device="meta"), InputError, "expected mask on cpu"),
        "gradient": (good.clone().requires_grad_(), InputError, r"mask without a gradient.*mask.detach\(\)"),
        "subclass": (Elsewhere(good), DTypeError, "ordinary tensor as mask, got a Elsewhere"),
        "bool subclass": (Elsewhere(good.bool()), DTypeError, "ordinary tensor as mask, got a Elsewhere"),
    }  # fmt: skip


class Elsewhere(Tensor):
    """A tensor that holds its values elsewhere, as a DTensor does; F.batch_norm would be given it all the same."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, of):
        return Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype, device=of.device)

    def __init__(self, of) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", bad_masks().values(), ids=bad_masks())
def test_a_mask_that_does_not_fit_is_refused_before_any_collective(bad, training):
    mask, error, match = bad
    layer = SyncBatchNorm(3, process_group=Unreachable()).train(training)
    with pytest.raises(error, match=match):
        layer(torch.randn(4, 3, 5), mask=mask)
    assert layer.num_batches_tracked == 0


def layer_with_state(comm) -> tuple[SyncBatchNorm, Callable[[], bool]]:
    layer = randomized(SyncBatchNorm(3, process_group=comm))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    return layer, lambda: all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@BOTH
@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("holder", [0, 1])
def test_bad_weights_of_one_replica_are_an_error_on_every_one(holder, bad, kernels):
    """After the one collective, which all take part in; also where the bad weights would sum to something good."""

    def replica(comm):
        recording = Recording(comm)
        layer, unmoved = layer_with_state(recording)
        mask = torch.ones(4)
        mask[1] = bad if comm.rank == holder else 0
        with pytest.raises(InputError, match="expected a mask of finite weights that are not negative"):
            layer(torch.randn(4, 3), mask=mask)
        return unmoved(), recording.calls

    with kernels():
        assert run_threads(2, replica) == [(True, [(7, torch.float64)])] * 2


def test_bad_weights_are_an_error_also_where_there_is_no_mask():
    def replica(comm):
        with pytest.raises(InputError, match="expected a mask of finite weights"):
            SyncBatchNorm(3, process_group=comm)(torch.randn(4, 3), mask=None if comm.rank else torch.full((4,), -1.0))
        return True

    assert all(run_threads(2, replica))


@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_an_accelerator_gets_nan_for_bad_weights_and_keeps_its_statistics(bad, monkeypatch):
    """Nobody reads the number there."""
    monkeypatch.setattr(syncbn._statistics, "are_plain", lambda *_: False)
    layer, unmoved = layer_with_state(None)
    x = torch.randn(4, 3, requires_grad=True)
    with composed_only():
        y = layer(x, mask=torch.tensor([1, bad, 1, 0]))
        y.sum().backward()
    assert y.isnan().all()
    assert unmoved()


# Nothing, almost nothing


@BOTH
def test_where_nothing_is_valid_the_output_is_the_bias(kernels):
    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm, activation="relu", dtype=torch.float64))
        before = layer.running_mean.clone(), layer.running_var.clone()
        x = torch.randn(0 if comm.rank == 2 else 4, 3, 5, dtype=torch.float64, requires_grad=True)
        y = layer(x, mask=None if comm.rank == 2 else torch.zeros(4, 5, dtype=torch.bool))
        assert torch.equal(y, layer.bias.relu().view(1, 3, 1).expand_as(x))
        y.sum().backward(retain_graph=True)
        (again,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(again.square().sum(), x)
        assert not any(t.any() for t in (x.grad, again, second))
        assert torch.equal(layer.bias.grad, x.shape[0] * 5.0 * (layer.bias > 0))
        assert not layer.weight.grad.any()
        assert torch.equal(layer.running_mean, before[0])
        assert torch.equal(layer.running_var, before[1])
        return layer.num_batches_tracked.item()

    with kernels():
        assert run_threads(3, replica) == [1, 1, 1]


@BOTH
@pytest.mark.parametrize("weights", [[0.0, 1, 0], [0.0, 0.5, 0], [0.25, 0.5, 0.25]], ids=str)
def test_one_value_in_the_world_is_an_error_on_every_replica(weights, kernels):
    """Also where weights sum to one, or to less; also on a replica without values, which has no mask."""

    def replica(comm):
        layer, unmoved = layer_with_state(comm)
        x, mask = torch.randn(0 if comm.rank == 2 else 3, 3), [torch.tensor(weights), torch.zeros(3), None][comm.rank]
        with pytest.raises(InputError, match="more than 1 value per channel over all replicas"):
            layer(x, mask=mask)
        return comm.rank == 2 or unmoved()

    with kernels():
        assert all(run_threads(3, replica))


def test_an_accelerator_gets_the_bias_for_less_than_one_value(monkeypatch):
    monkeypatch.setattr(syncbn._statistics, "are_plain", lambda *_: False)
    layer = randomized(SyncBatchNorm(3))
    x = torch.randn(4, 3, requires_grad=True)
    with composed_only():
        y = layer(x, mask=torch.tensor([0.25, 0.25, 0, 0]))
    assert torch.equal(y, layer.bias.expand(4, 3))
    y.square().sum().backward()
    assert not x.grad.any()


def test_one_value_that_weighs_more_is_no_error():
    """As if it came twice: it has a variance, of 0."""
    y = SyncBatchNorm(3)(torch.randn(1, 3), mask=torch.tensor([2.0]))
    assert not y.any()


# Eval


def test_eval_does_not_use_it():
    layer = SyncBatchNorm(3, process_group=Unreachable()).eval()
    x = torch.randn(4, 3, 5)
    assert torch.equal(layer(x, mask=torch.rand(4, 5) < 0.5), layer(x))


@pytest.mark.parametrize("traced", [False, True])
def test_eval_without_statistics_takes_those_of_its_own_valid_values(traced):
    layer = randomized(SyncBatchNorm(3, process_group=Unreachable(), track_running_stats=False)).eval()
    x, mask = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 5) < 0.5
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if traced else layer
    y = run(x, mask=mask)
    expected = whole(to_rows(x)[mask.view(-1)].double(), torch.ones(3))
    assert_tensor_close(to_rows(y)[mask.view(-1)], expected.y)


# Who else looks on


def test_compiled_for_sizes_that_change():
    """The second size makes the input's sizes unknown to the compiler; the mask's, which comes later, it knows."""
    torch._dynamo.reset()
    layer = SyncBatchNorm(3, process_group=SingleProcess(), track_running_stats=False).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for samples, length in ((4, 6), (5, 7)):
        compiled(torch.randn(samples, 3, length, dtype=torch.float64))
    x, mask = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 5) < 0.7
    for shape in ((6, 5), (6, 1, 5)):
        assert_tensor_close(compiled(x, mask=mask.view(shape)), layer(x, mask=mask))


def masked(layer: nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, mask=mask)


def test_func_grad():
    batch = random_batch(SHAPES[1:3])
    masks = random_masks(batch, weights=True)
    expected = train(batch, masks)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm, dtype=torch.float64))
        f = masked(layer, masks[comm.rank])
        return torch.func.grad(lambda x: (f(x) * batch.gs[comm.rank]).sum())(batch.xs[comm.rank])

    assert_tensor_close(rows_in(run_threads(2, replica)), expected.dx)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_repeat_it(reentrant):
    batch = random_batch(SHAPES[1:3])
    masks = random_masks(batch, weights=True)
    expected = train(batch, masks)

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm, dtype=torch.float64))
        x = batch.xs[comm.rank].clone().requires_grad_()
        y = checkpoint(masked(layer, masks[comm.rank]), x, use_reentrant=reentrant)
        (y * batch.gs[comm.rank]).sum().backward()
        return y.detach(), x.grad, layer

    ours = Outcome(*map(list, zip(*run_threads(2, replica), strict=True)))
    assert_tensor_close(ours.dx, expected.dx)
    assert_same_parameters_and_statistics(ours, expected)


class Model(nn.Module):
    """A convolution, and a norm over what is valid."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = randomized(norm)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(2 * x, mask=mask)


def _compiled(rank: int, size: int, how: str) -> None:
    """Real ranks: 0 eagerly, 1 as `how` says; also the second derivative."""
    torch._dynamo.reset()
    batch = random_batch([(4, 3, 6), (2, 3, 5)])
    masks = random_masks(batch, weights=True)
    net = Model(SyncBatchNorm(3)).double()
    run: Callable[..., Tensor] = net
    if rank and how == "traced":
        run = torch.jit.trace(net, (batch.xs[rank], masks[rank]), check_trace=False)
        net.norm.reset_running_stats()
    elif how == "traced":
        net(batch.xs[rank], masks[rank])
        net.norm.reset_running_stats()
    elif rank:
        run = torch.compile(net, backend=how, fullgraph=True)
    x = batch.xs[rank].clone().requires_grad_()
    (run(x, masks[rank]) * batch.gs[rank]).sum().backward()
    rows_x, g, w = rows(batch, masks)
    rows_x.requires_grad_()
    y = definition(2 * rows_x, w, net.norm.weight.detach(), net.norm.bias.detach())
    (y * g).sum().backward()
    starts = [0, len(to_rows(batch.xs[0])), len(rows_x)]
    torch.testing.assert_close(to_rows(x.grad), rows_x.grad[starts[rank] : starts[rank + 1]], rtol=1e-9, atol=1e-11)
    assert net.norm.num_batches_tracked == 1
    mean = 2 * (w * rows_x.detach()).sum(0) / w.sum()
    torch.testing.assert_close(net.norm.running_mean, 0.1 * mean, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["aot_eager", "traced"])
def test_real_ranks_on_different_paths(gloo, how):
    gloo(2, _compiled, how)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_trace_is_saved_and_checks_its_mask():
    net = Model(SyncBatchNorm(3))
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.5
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, (x, mask), check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x, mask), net(x, mask))
    with pytest.raises((RuntimeError, ValueError), match="expected mask of shape"):
        loaded(x, mask[:2])


def test_fake_tensors_give_shapes_and_issue_no_collective():
    net = Model(SyncBatchNorm(3, process_group=Unreachable()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, mask = mode.from_tensor(torch.randn(4, 3, 5)).requires_grad_(), mode.from_tensor(torch.ones(4, 5))
        y = net(x, mask)
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_the_layer_is_a_leaf_of_torch_fx():
    net = Model(SyncBatchNorm(3))
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm"]
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.5
    assert torch.equal(traced(x, mask), net(x, mask))


def test_an_export_in_training_with_a_mask_is_refused():
    with pytest.raises(ConversionError, match="know no mask: export in eval mode"):
        torch.export.export(Model(SyncBatchNorm(3)), (torch.randn(4, 3, 5), torch.ones(4, 5)))


def test_converted_layers_take_it():
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.5
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3))
    assert torch.equal(layer(x, mask=mask), sync_batch_norm(x, mask=mask))


# Kernels


def test_outside_huge_values_do_not_reach_the_valid_ones():
    """In backward_input, too: infinity times a weight of 0 would be NaN."""
    x, dy = torch.full((4, 1), 3e38), torch.zeros(4, 1)
    x[:2] = torch.tensor([[1.0], [2.0]])
    mask = torch.tensor([True, True, False, False])
    known = torch.tensor([1.5, 20.0, 2.0]).double()
    dx = _composed.backward_input(dy, x, known, Epilogue(), torch.ones(2).double(), mask)
    assert dx[:2].isfinite().all()
    assert not dx[2:].any()


# The helper


def test_lengths_and_sizes():
    like = torch.zeros(2, 8, 4)
    expected = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 1]]]).bool()
    for sizes in ([1, 4], torch.tensor([1, 4]), torch.tensor([[1], [4]], dtype=torch.int32), (1, 4)):
        assert torch.equal(valid_positions(sizes, like), expected)
    images = [torch.ones(3, h, w) for h, w in ((2, 3), (4, 1), (0, 2))]
    like = torch.zeros(3, 3, 4, 5)
    for n, image in enumerate(images):
        like[n, :, : image.shape[1], : image.shape[2]] = image
    mask = valid_positions([image.shape[-2:] for image in images], like)
    assert mask.shape == (3, 1, 4, 5)
    assert torch.equal(mask.expand_as(like), like.bool())
    volume = valid_positions([(1, 2, 3)], torch.zeros(1, 2, 2, 2, 3))
    assert volume.sum() == 6
    for like in (torch.zeros(0, 3, 4), torch.zeros(0, 3, 4, 4)):
        assert valid_positions([], like).shape == (0, 1, *like.shape[2:])


@pytest.mark.parametrize(
    ("sizes", "shape", "error", "match"),
    [
        ([1, -1], (2, 3, 4), InputError, r"between 0 and those of like, \(4,\), got \(-1,\) for sample 1"),
        ([1, 5], (2, 3, 4), InputError, r"got \(5,\) for sample 1"),
        ([(1, 2), (3, 6)], (2, 3, 4, 5), InputError, r"got \(3, 6\) for sample 1"),
        ([1], (2, 3, 4), InputError, r"expected sizes of shape \(2, 1\).*got \(1,\)"),
        ([1, 2], (2, 3, 4, 5), InputError, r"expected sizes of shape \(2, 2\)"),
        ([], (2, 3, 4), InputError, r"expected sizes of shape \(2, 1\)"),
        ([(1, 2), (3,)], (2, 3, 4, 5), InputError, "equally many for each sample"),
        ([1.0, 2.0], (2, 3, 4), DTypeError, "expected sizes as integers, got torch.float32"),
        ([True, True], (2, 3, 4), DTypeError, "expected sizes as integers, got torch.bool"),
        ([1, 2], (2, 3), InputError, r"expected like of shape \(N, C, \*\)"),
    ],
)
def test_sizes_that_do_not_fit(sizes, shape, error, match):
    with pytest.raises(error, match=match):
        valid_positions(sizes, torch.zeros(shape))


def test_sizes_under_a_compiler():
    run = torch.compile(valid_positions, backend="aot_eager", fullgraph=True)
    sizes, like = torch.tensor([1, 3]), torch.zeros(2, 8, 4)
    assert torch.equal(run(sizes, like), valid_positions(sizes, like))


def test_padding_changes_nothing():
    """Images of other sizes on each replica, padded: as the values of all images alone."""
    images = [[torch.randn(3, h, w, dtype=torch.float64) for h, w in sizes] for sizes in ([(2, 3), (4, 4)], [(1, 5)])]

    def replica(comm):
        mine = images[comm.rank]
        x = torch.zeros(len(mine), 3, 4, 5, dtype=torch.float64)
        for n, image in enumerate(mine):
            x[n, :, : image.shape[1], : image.shape[2]] = image
        mask = valid_positions([image.shape[-2:] for image in mine], x)
        y = randomized(SyncBatchNorm(3, process_group=comm, dtype=torch.float64))(x, mask=mask)
        return to_rows(y)[mask.view(-1)]

    x = torch.cat([to_rows(image[None]) for mine in images for image in mine])
    assert_tensor_close(torch.cat(run_threads(2, replica)), whole(x, torch.ones(3)).y)
