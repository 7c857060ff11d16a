"""run_threads, and the communicator that it hands out. The conformance suite runs over it in test_communicators.py."""

import threading
import time

import pytest
import torch
from reference import step

from syncbn import SyncBatchNorm
from syncbn.comm import Communicator, run_threads
from syncbn.errors import CollectiveError, DTypeError


class PlannedError(Exception):
    """What a replica raises."""


def total(comm, value=None):
    """All-reduce one number, by default the rank."""
    return comm.all_reduce(torch.tensor([float(comm.rank if value is None else value)])).item()


@pytest.mark.parametrize("world", [1, 2, 5, 64])
def test_results_come_in_rank_order(world):
    results = run_threads(world, lambda comm: (comm.rank, comm.size, total(comm)))
    assert results == [(rank, world, world * (world - 1) / 2) for rank in range(world)]


def test_the_communicator_has_the_protocol():
    assert all(run_threads(2, lambda comm: isinstance(comm, Communicator)))


def test_a_world_of_none_is_refused():
    with pytest.raises(ValueError, match="expected 1 or more replicas, got 0"):
        run_threads(0, lambda comm: None)


def test_every_replica_gets_the_same_bits():
    """Numbers whose sum depends on the order."""
    values = torch.randn(5, 1000) * 10.0 ** torch.arange(5).view(5, 1)
    first, *others = run_threads(5, lambda comm: comm.all_reduce(values[comm.rank].clone()))
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, sum(values.flip(0)))  # negative control: the order does matter


def test_a_result_can_be_changed_without_harm_to_the_peers():
    def replica(comm):
        result = comm.all_reduce(torch.ones(3)).mul_(comm.rank)
        comm.all_reduce(torch.zeros(1))
        return result[0].item()

    assert run_threads(3, replica) == [0.0, 3.0, 6.0]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_the_callers(enabled):
    with torch.set_grad_enabled(enabled):
        assert run_threads(2, lambda comm: torch.is_grad_enabled()) == [enabled] * 2


def test_worlds_within_worlds():
    def replica(comm):
        return total(comm) + sum(run_threads(2, lambda inner: total(inner, comm.rank)))

    assert run_threads(2, replica) == [1.0, 5.0]


# Errors


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_an_error_releases_the_peers_and_comes_out(world, calls_before):
    released = []

    def replica(comm):
        try:
            for _ in range(calls_before):
                total(comm)
            if comm.rank == world - 1:
                raise PlannedError
            total(comm)
        except CollectiveError:
            released.append(comm.rank)
            raise

    with pytest.raises(PlannedError):
        run_threads(world, replica)
    assert sorted(released) == list(range(world - 1))


def test_an_error_in_backward_releases_the_peers():
    def replica(comm):
        x = torch.randn(4, 3, requires_grad=True)
        y = SyncBatchNorm(3, process_group=comm)(x)
        if comm.rank == 1:
            raise PlannedError
        y.sum().backward()

    with pytest.raises(PlannedError):
        run_threads(3, replica)


def test_an_error_releases_peers_within_groups():
    def replica(comm):
        part = comm.split([[0, 1], [2, 3]])
        if comm.rank == 3:
            raise PlannedError
        total(part)
        total(comm)

    with pytest.raises(PlannedError):
        run_threads(4, replica)


def test_an_error_releases_peers_in_groups_made_after_it():
    timeout = 3.0

    def replica(comm):
        if comm.rank == 0:
            raise PlannedError
        with pytest.raises(CollectiveError):  # rank 0 has failed now, for certain
            total(comm)
        total(comm.split([[0, 1]]))

    start = time.monotonic()
    with pytest.raises(PlannedError):
        run_threads(2, replica, timeout=timeout)
    assert time.monotonic() - start < timeout


DIFFERENT = {
    "length": lambda rank: torch.zeros(3 + (rank == 1)),
    "shape": lambda rank: torch.zeros((2, 3) if rank else (3, 2)),
    "dtype": lambda rank: torch.zeros(3, dtype=torch.float64 if rank else torch.float32),
}


@pytest.mark.parametrize("payload", DIFFERENT.values(), ids=DIFFERENT)
def test_different_payloads_are_an_error_on_every_replica(payload):
    def replica(comm):
        for _ in range(2):  # and from then on
            with pytest.raises(CollectiveError, match="the ranks ask for different sums"):
                comm.all_reduce(payload(comm.rank))

    run_threads(3, replica)


def test_layers_of_different_widths_are_an_error_and_not_garbage():
    def replica(comm):
        channels = 3 + comm.rank
        return step(SyncBatchNorm(channels, process_group=comm), torch.randn(4, channels), torch.randn(4, channels))

    with pytest.raises(CollectiveError, match=r"rank 0: .*; 7 x float64\)\nrank 1: .*; 9 x float64\)"):
        run_threads(2, replica)


def test_a_peer_that_does_not_call_is_an_error_after_the_deadline():
    with pytest.raises(CollectiveError, match=r"of 2 \(threads\).*did not call within 0.1 s"):
        run_threads(2, lambda comm: total(comm) if comm.rank else None, timeout=0.1)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), "float32 or float64, got torch.bfloat16: convert"),
        (torch.zeros(2, dtype=torch.int64), "float32 or float64, got torch.int64"),
        (torch.zeros(2, requires_grad=True), "without grad"),
        (torch.zeros(2, 3).t(), "contiguous"),
    ],
    ids=["bfloat16", "int64", "grad", "strides"],
)
def test_what_cannot_be_summed_is_refused(payload, message):
    with pytest.raises(DTypeError, match=message):
        run_threads(2, lambda comm: comm.all_reduce(payload))


# Groups


@pytest.mark.parametrize(
    "partition",
    [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 1, 0, 2]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]],
    ids=str,
)
def test_groups_sum_by_themselves(partition):
    def replica(comm):
        part = comm.split(partition)
        return part.size, part.rank, total(part, comm.rank), total(comm)

    for rank, (size, number, of_group, of_world) in enumerate(run_threads(4, replica)):
        mine = next(part for part in partition if rank in part)
        assert (size, number, of_group, of_world) == (len(mine), mine.index(rank), sum(mine), 6.0)


def test_groups_of_groups():
    def replica(comm):
        half = comm.split([[0, 1, 2, 3], [4, 5, 6, 7]])
        quarter = half.split([[0, 1], [2, 3]])
        return total(quarter, comm.rank)

    assert run_threads(8, replica) == [1, 1, 5, 5, 9, 9, 13, 13]


def test_groups_at_their_own_pace():
    """Groups do not wait for one another, and two communicators of the same group stay in step."""

    def replica(comm):
        parts = [comm.split([[0, 1], [2, 3]]) for _ in range(2)]
        for _ in range(10 * (1 + comm.rank // 2)):
            for part in parts:
                total(part)
        return total(parts[0])

    assert run_threads(4, replica) == [1.0] * 4


def test_a_partition_without_this_rank_is_a_clear_error():
    with pytest.raises(ValueError, match="rank 1"):
        run_threads(2, lambda comm: comm.split([[0]]))


# Autograd


def test_backward_from_another_thread():
    """Autograd runs backwards of accelerators on threads of its own."""

    def replica(comm):
        x = torch.randn(4, 3, requires_grad=True)
        y = SyncBatchNorm(3, process_group=comm)(x)
        thread = threading.Thread(target=(y * y.detach().cos()).sum().backward)
        thread.start()
        thread.join()
        return x.grad

    assert all(grad.any() for grad in run_threads(2, replica))
