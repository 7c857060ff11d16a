"""Nothing, almost nothing, far too much: empty replicas, no variance, large means, inf and NaN, many replicas."""

import pytest
import torch
from reference import (
    FLOATS,
    WORLDS,
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

from syncbn import SyncBatchNorm
from syncbn.comm import run_threads
from syncbn.errors import InputError


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_one_empty_replica(empty, dtype, input_grad):
    batch = random_batch([(0 if rank == empty else 3, 4, 5) for rank in range(3)], dtype)
    expected = whole_batch(batch, dtype=dtype)
    ours = replicas(batch, dtype=dtype, input_grad=input_grad)
    assert_close(ours, expected if input_grad else expected._replace(dx=[]))
    assert ours.y[empty].dtype == dtype


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 0, 4)])
@pytest.mark.parametrize("world", WORLDS)
def test_all_replicas_empty(world, shape):
    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm))
        step(layer, torch.randn(5, 3), torch.randn(5, 3))
        layer.zero_grad()
        before = [layer.running_mean.clone(), layer.running_var.clone()]
        y, dx = step(layer, torch.empty(shape), torch.empty(shape))
        return layer, before, y, dx

    for layer, (mean, var), y, dx in run_threads(world, replica):
        assert y.shape == dx.shape == shape
        assert torch.equal(layer.running_mean, mean)
        assert torch.equal(layer.running_var, var)
        assert not layer.weight.grad.any()
        assert not layer.bias.grad.any()


def test_an_empty_replica_has_no_share_in_the_parameter_gradients():
    def replica(comm):
        layer = SyncBatchNorm(3, process_group=comm)
        shape = (0 if comm.rank else 4, 3)
        step(layer, torch.randn(shape), torch.randn(shape))
        return [p.grad for p in layer.parameters()]

    full, empty = run_threads(2, replica)
    assert all(grad.all() for grad in full)
    assert not any(grad.any() for grad in empty)


@pytest.mark.parametrize("holder", [0, 1, 2])
def test_one_value_in_the_whole_world_is_an_error_on_every_replica(holder):
    def replica(comm):
        layer = SyncBatchNorm(3, process_group=comm)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with pytest.raises(InputError, match="more than 1 value per channel over all replicas"):
            layer(torch.ones(1 if comm.rank == holder else 0, 3, 1, 1))
        return all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    assert all(run_threads(3, replica))


def test_one_value_in_a_world_of_one_is_a_value_error_as_in_torch():
    for layer in (SyncBatchNorm(3), torch.nn.BatchNorm1d(3)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(torch.ones(1, 3))


@pytest.mark.parametrize(("mean", "tolerance"), [(1e2, 1e-6), (1e3, 1e-6), (1e4, 1e-5)])
@pytest.mark.parametrize("world", [1, 4])
def test_a_mean_far_from_zero(world, mean, tolerance):
    batch = random_batch([(64, 3, 8)] * world, torch.float32, mean=mean)
    ours = replicas(batch, momentum=1.0)
    expected = whole_batch(batch, momentum=1.0)
    torch.testing.assert_close(ours.running_var[0].double(), expected.running_var[0], rtol=tolerance, atol=0)
    for y, reference in zip(ours.y + ours.dx, expected.y + expected.dx, strict=True):
        assert_tensor_close(y, reference, factor=2)


def test_naive_sums_would_not_do():
    """Negative control of the test above: float32 sums of squares lose the variance."""
    (x,), _ = random_batch([(256, 1)], torch.float32, mean=1e4)
    naive = x.square().mean() - x.mean().square()
    assert abs(naive - 1) > 0.1


@pytest.mark.parametrize("value", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("std", [0.0, 1e-6])
def test_a_nearly_constant_channel(value, std):
    batch = random_batch([(16, 2, 4)] * 3, mean=value, std=std)
    # S2/N - μ² is off by about 1e-16·μ², which eps = 1e-5 makes 1e-11·μ² of the result.
    assert_close(replicas(batch), whole_batch(batch), factor=1 + 20 * value**2)


def test_the_variance_of_constant_channels_is_never_negative():
    """S2/N - μ² rounds to either side of 0."""
    constants = 10 * random_batch([(1, 1000)]).xs[0]
    batch = Batch([constants.expand(3, -1)] * 3, [torch.ones(3, 1000).double()] * 3)
    ours = replicas(batch, momentum=1.0, dtype=torch.float64)
    assert ours.running_var[0].min() == 0
    assert ours.running_var[0].max() < 1e-11


def test_no_eps_and_channels_constant_on_each_replica():
    _, gs = random_batch([(4, 3)] * 3)
    batch = Batch([torch.full((4, 3), value, dtype=torch.float64) for value in (1.0, 2.0, 4.0)], gs)
    assert_close(replicas(batch, eps=0.0), whole_batch(batch, eps=1e-300))  # torch refuses 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_values_than_half_can_count(dtype):
    batch = random_batch([(35_000, 2)] * 2, dtype)
    ours = replicas(batch, dtype=dtype)
    expected = whole_batch(batch, dtype=dtype)
    for name in ("y", "dx", "running_mean", "running_var"):
        for a, e in zip(getattr(ours, name), getattr(expected, name), strict=True):
            assert_tensor_close(a, e, name=name)
    assert ours.dweight[0].isfinite().all()


def test_huge_gradients_in_half():
    (x1, x2), (g1, g2) = random_batch([(64, 3, 4)] * 2, torch.float16)
    batch = Batch([x1, x2], [g1.sign() * 6e4 / 2, g2.sign() * 6e4 / 2])
    ours, expected = replicas(batch), whole_batch(batch)
    assert sum(g.abs().sum() for g in batch.gs).isinf()
    for a, e in zip(ours.dx, expected.dx, strict=True):
        assert_tensor_close(a, e)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("rank", [0, 2])
def test_inf_and_nan_spread_over_their_channel_only(rank, bad):
    batch = random_batch([(4, 2, 3)] * 3)
    clean = whole_batch(batch)
    batch.xs[rank][1, 0, 1] = bad
    ours = replicas(batch)
    for found, expected in zip(ours.y + ours.dx, clean.y + clean.dx, strict=True):
        assert found[:, 0].isnan().all()
        assert_tensor_close(found[:, 1], expected[:, 1])
    assert not ours.running_var[0][0].isfinite()
    assert_tensor_close(ours.running_var[0][1], clean.running_var[0][1])


@pytest.mark.parametrize(("world", "dtype"), [(64, torch.float64), (64, torch.float32), (256, torch.float64)])
def test_many_replicas(world, dtype):
    """The tolerance is that of two replicas: the error does not grow with the world."""
    batch = random_batch([(1 + rank % 3, 2) for rank in range(world)], dtype, mean=5)
    assert_close(replicas(batch, dtype=dtype), whole_batch(batch, dtype=dtype))


def test_the_reference_takes_rows_of_any_shape():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(to_rows(x).mean(0), to_rows(x.flatten(2)).mean(0))
    assert torch.equal(to_rows(x)[0], x[0, :, 0, 0])


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_domain_of_exactness(world, ratio):
    """Sums about zero cost a relative error of the variance of about 2⁻⁵³·(mean/std)², however the batch is split."""
    batch = random_batch([(60 // world, 3, 20)] * world, mean=ratio)
    expected = torch.cat([to_rows(x) for x in batch.xs]).var(0)
    (var,) = replicas(batch, momentum=1.0, dtype=torch.float64).running_var
    error = ((var - expected) / expected).abs().max().item()
    assert error <= 8 * 2**-53 * (1 + ratio**2)
    assert ratio < 1e6 or error > 1e-9  # so it is said, and not promised away
