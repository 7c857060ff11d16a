"""Training on P replicas is training on their concatenation."""

import pytest
import torch
from reference import (
    WITHOUT_BIAS,
    WORLDS,
    Batch,
    assert_close,
    assert_tensor_close,
    random_batch,
    randomized,
    replicas,
    step,
    whole_batch,
)
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.comm import SingleProcess, run_threads
from syncbn.functional import sync_batch_norm

SHAPES = [(4, 3), (4, 3, 7), (2, 3, 5, 6), (2, 3, 2, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_step_equals_the_whole_batch(world, shape, dtype):
    batch = random_batch([shape] * world, dtype, mean=3, std=2)
    assert_close(replicas(batch, dtype=dtype), whole_batch(batch, dtype=dtype))


@pytest.mark.parametrize("channels", [1, 3, 8, 33])
def test_any_number_of_channels(channels):
    batch = random_batch([(2, channels, 3, 3)] * 3)
    assert_close(replicas(batch), whole_batch(batch))


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, WITHOUT_BIAS, {"eps": 0.1}, {"momentum": 0.9}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("world", [1, 3])
def test_every_option(world, options):
    batch = random_batch([(4, 3, 5)] * world)
    assert_close(replicas(batch, **options), whole_batch(batch, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world", WORLDS)
def test_five_steps_with_accumulated_gradients(world, dtype):
    batches = [random_batch([(3, 4, 2, 2)] * world, dtype, seed=seed) for seed in range(5)]
    ours = replicas(*batches, dtype=dtype)
    assert_close(ours, whole_batch(*batches, dtype=dtype), factor=2)
    assert ours.num_batches_tracked[0] == 5


UNEQUAL = {
    "samples": [(rank + 1, 3, 4, 4) for rank in range(4)],
    "sizes": [(2, 3, 4 + rank, 7 - rank) for rank in range(4)],
    "dimensions": [(2, 3), (2, 3, 5), (2, 3, 4, 4), (1, 3, 2, 2, 2)],
    "one value on one replica": [(8, 3), (1, 3), (5, 3)],
    "one value each": [(1, 3, 1, 1)] * 4,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shapes", UNEQUAL.values(), ids=UNEQUAL)
def test_replicas_of_unequal_size(shapes, dtype):
    batch = random_batch(shapes, dtype)
    assert_close(replicas(batch, dtype=dtype), whole_batch(batch, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_replicas_of_unequal_scale(dtype):
    xs, gs = random_batch([(4, 3, 5)] * 3, dtype)
    batch = Batch([xs[0] * 50, xs[1] + 10, xs[2]], gs)
    assert_close(replicas(batch, dtype=dtype), whole_batch(batch, dtype=dtype))


def test_the_split_does_not_matter():
    (x,), (g,) = random_batch([(12, 3, 4)])
    splits = [Batch(list(x.chunk(world)), list(g.chunk(world))) for world in WORLDS]
    whole, *others = [replicas(batch) for batch in splits]
    for outcome in others:
        assert_close(outcome._replace(y=[], dx=[]), whole._replace(y=[], dx=[]))
        assert_tensor_close(torch.cat(outcome.dx), whole.dx[0])


@pytest.mark.parametrize("world", WORLDS)
def test_buffers_are_bitwise_equal_on_all_replicas(world):
    batches = [random_batch([(3, 4, 5)] * world, torch.float32, seed=seed) for seed in range(5)]

    def replica(comm):
        layer = SyncBatchNorm(4, process_group=comm)
        for xs, gs in batches:
            step(layer, xs[comm.rank], gs[comm.rank])
        return layer.state_dict()

    first, *others = run_threads(world, replica)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_groups_normalise_by_themselves():
    batch = random_batch([(4, 3, 5)] * 4)
    halves = [Batch(batch.xs[part], batch.gs[part]) for part in (slice(0, 2), slice(2, 4))]
    left, right = [whole_batch(half) for half in halves]
    ours = replicas(batch, communicator=lambda comm: comm.split([[0, 1], [2, 3]]))
    assert_close(
        ours._replace(dweight=[], dbias=[]),
        left._replace(y=left.y + right.y, dx=left.dx + right.dx, dweight=[], dbias=[]),
    )


@pytest.mark.parametrize("momentum", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["float", "tensor"])
def test_the_function_alone(momentum):
    batch = random_batch([(4, 3, 5)] * 2)
    expected = whole_batch(batch, momentum=0.3)

    def replica(comm):
        layer = randomized(nn.BatchNorm1d(3)).double()
        statistics = [layer.running_mean, layer.running_var]
        y = sync_batch_norm(
            batch.xs[comm.rank], *statistics, layer.weight, layer.bias, momentum=momentum, process_group=comm
        )
        return y, *statistics

    for rank, (y, mean, var) in enumerate(run_threads(2, replica)):
        assert_tensor_close(y, expected.y[rank])
        assert_tensor_close(mean, expected.running_mean[0])
        assert_tensor_close(var, expected.running_var[0])


# Negative controls: each is a mistake that a careless comparison would let pass.


class _Mistaken:
    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size


class AveragesInstead(_Mistaken):
    """Wrong counts, the right mean and variance: seen in running_var and dx."""

    def all_reduce(self, x):
        return self.comm.all_reduce(x) / self.size


class DeafInBackward(_Mistaken):
    """The right forward; dx with this replica's sums only. An even length is 2C+1 and 3 of signature, the forward."""

    def all_reduce(self, x):
        return x if x.numel() % 2 else self.comm.all_reduce(x)


class DoublesInBackward(_Mistaken):
    def all_reduce(self, x):
        return self.comm.all_reduce(2 * x if x.numel() % 2 else x)


@pytest.mark.parametrize(
    ("mistake", "field"),
    [
        (lambda comm: SingleProcess(), "y"),
        (AveragesInstead, "running_var"),
        (DeafInBackward, "dx"),
        (DoublesInBackward, "dx"),
    ],
    ids=["local", "average", "deaf", "double"],
)
def test_mistakes_are_seen(mistake, field):
    batch = random_batch([(4, 3, 5)] * 2)
    with pytest.raises(AssertionError, match=f"^{field}"):
        assert_close(replicas(batch, communicator=mistake), whole_batch(batch))


def test_a_wrong_parameter_gradient_is_seen():
    batch = random_batch([(4, 3, 5)] * 2)
    ours = replicas(batch)
    with pytest.raises(AssertionError, match=r"^dweight"):
        assert_close(ours._replace(dweight=[ours.dweight[0] / 2]), whole_batch(batch))
