"""The schedule: a training forward sums 2C+1 numbers once, its backward 2C once, in float64, whatever comes in."""

import pytest
import torch
from reference import FLOATS, SIGNATURE, Recording, random_batch, step
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.comm import run_threads

FORWARD, BACKWARD = (7, torch.float64), (6, torch.float64)  # of 3 channels


def record(world, fn):
    """Run `fn(comm)` with a recording communicator on each replica; return what they all recorded."""

    def replica(comm):
        recording = Recording(comm)
        fn(recording)
        return recording.calls

    first, *others = run_threads(world, replica)
    assert all(calls == first for calls in others)
    return first


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 4), (1, 3, 2, 2, 2), (0, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_collective_each_way(shape, dtype):
    def train(comm):
        step(SyncBatchNorm(3, process_group=comm), torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype))

    assert record(2, train) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("channels", [1, 8, 33])
def test_lengths_follow_the_channels_alone(channels):
    def train(comm):
        x = torch.randn(3 + comm.rank, channels, 4)
        step(SyncBatchNorm(channels, process_group=comm), x, x)

    assert record(3, train) == [(2 * channels + 1, torch.float64), (2 * channels, torch.float64)]


def test_replicas_that_differ_in_everything_local():
    """dtype, layout, shape and emptiness are each replica's own affair: the payload is the same."""
    xs = [
        torch.randn(2, 3, 4, 4, dtype=torch.float16),
        torch.randn(3, 3, 2, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last),
        torch.empty(0, 3, dtype=torch.bfloat16),
    ]

    def train(comm):
        step(SyncBatchNorm(3, process_group=comm), xs[comm.rank], torch.ones_like(xs[comm.rank]))

    assert record(3, train) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_options_do_not_change_the_schedule(options):
    def train(comm):
        step(SyncBatchNorm(3, process_group=comm, **options), torch.randn(4, 3), torch.randn(4, 3))

    assert record(2, train) == [FORWARD, BACKWARD]


def test_no_collective_backward_where_the_input_needs_no_gradient():
    def train(comm):
        step(SyncBatchNorm(3, process_group=comm), torch.randn(4, 3), torch.randn(4, 3), input_grad=False)

    assert record(2, train) == [FORWARD]


def test_no_backward_no_collective():
    def forward(comm):
        with torch.no_grad():
            SyncBatchNorm(3, process_group=comm)(torch.randn(4, 3))

    assert record(2, forward) == [FORWARD]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_eval_is_silent(options):
    def evaluate(comm):
        layer = SyncBatchNorm(3, process_group=comm, **options).eval()
        step(layer, torch.randn(4, 3), torch.randn(4, 3))

    assert record(2, evaluate) == []


def test_a_model_issues_them_layer_by_layer():
    def train(comm):
        layers = [SyncBatchNorm(width, process_group=comm) for width in (3, 4, 5)]
        net = nn.Sequential(nn.Linear(2, 3), layers[0], nn.Linear(3, 4), layers[1], nn.Linear(4, 5), layers[2])
        for seed in range(2):
            (x,), _ = random_batch([(6, 2)], torch.float32, seed=seed)
            step(net, x, torch.randn(6, 5), input_grad=False)

    lengths = [7, 9, 11, 10, 8, 6]
    assert record(2, train) == [(length, torch.float64) for length in 2 * lengths]


def test_the_double_backward_sums_too():
    """One more pass through the statistics each way: 2C+1, then only 2C at a time."""

    def penalty(comm):
        x = torch.randn(4, 3, requires_grad=True)
        y = SyncBatchNorm(3, process_group=comm)(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()

    first, *others = record(2, penalty)
    assert first == FORWARD
    assert others == [BACKWARD] * len(others)
    assert len(others) >= 2


def test_another_schedule_is_seen():
    """Negative control: one collective more is recorded, and replicas that do not record the same are caught."""

    def chatty(comm):
        SyncBatchNorm(3, process_group=comm)(torch.randn(4, 3))
        comm.all_reduce(torch.zeros(2))

    assert record(2, chatty) == [FORWARD, (2 - SIGNATURE, torch.float32)]
    with pytest.raises(AssertionError):
        record(2, lambda comm: comm.calls.append(comm.rank))
