"""What every communicator must do: one list of checks, run over all of them by whatever starts them."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from syncbn.comm import Communicator, SingleProcess
from syncbn.comm._protocol import BaseCommunicator, LostGroup
from syncbn.errors import CollectiveError, DTypeError, GroupError

LENGTHS = (0, 1, 3, 4097)
DTYPES = (torch.float32, torch.float64)


def values(rank: int, length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return what rank `rank` contributes: any rank can make it, so any rank can check the sum."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(length, generator=generator, dtype=torch.float64).to(dtype)


def expected_sum(size: int, length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return sum((values(r, length, dtype, seed).double() for r in range(size)), torch.zeros(length).double())


def sums(comm: Communicator) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            total = comm.all_reduce(values(comm.rank, length, dtype))
            assert total.dtype == dtype
            assert total.shape == (length,)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-13
            torch.testing.assert_close(
                total.double(), expected_sum(comm.size, length, dtype), rtol=tolerance, atol=tolerance
            )


def same_bits_everywhere(comm: Communicator) -> None:
    # Terms of very different size: another order of addition gives other bits.
    mine = values(comm.rank, 101, torch.float64) * 10.0 ** (3 * comm.rank)
    total = comm.all_reduce(mine.clone())
    halves = total.view(torch.int32).double()  # (202,) exact
    deviation = comm.all_reduce(halves.clone()) - comm.size * halves
    assert deviation.abs().max() == 0


def other_shapes(comm: Communicator) -> None:
    total = comm.all_reduce(torch.full((2, 3), float(comm.rank + 1)))
    assert torch.equal(total, torch.full((2, 3), comm.size * (comm.size + 1) / 2))


def many_in_a_row(comm: Communicator) -> None:
    for step in range(200):
        length = 1 + step % 7
        total = comm.all_reduce(values(comm.rank, length, torch.float64, step))
        torch.testing.assert_close(total, expected_sum(comm.size, length, torch.float64, step))


def refuses_what_it_cannot_sum(comm: Communicator) -> None:
    for bad in (
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, requires_grad=True),
        torch.ones(3, 4).t(),
        torch.ones(3).to_sparse(),
        torch._neg_view(torch.ones(3)),
        torch.nn.Parameter(torch.ones(3), requires_grad=False),
        torch.ones(3, dtype=torch.uint8),
    ):
        with pytest.raises(DTypeError):
            comm.all_reduce(bad)
    with pytest.raises(DTypeError, match=r"torch\.func"):
        torch.func.vmap(comm.all_reduce)(torch.ones(2, 3))


def from_another_thread(comm: Communicator) -> None:
    """Autograd calls from threads of its own."""
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(comm.all_reduce(torch.ones(5))))
    thread.start()
    thread.join()
    assert torch.equal(results[0], torch.full((5,), float(comm.size)))


def copies_share_pickles_drop(comm: Communicator) -> None:
    assert copy.deepcopy(comm) is comm
    assert isinstance(pickle.loads(pickle.dumps(comm)), (LostGroup, SingleProcess))


def says_what_it_is(comm: BaseCommunicator) -> None:
    assert repr(comm) == f"{type(comm).__name__}(rank {comm.rank} of {comm.size}, {comm.transport}, open)"
    assert comm.transport


def rank_and_size(comm: Communicator) -> None:
    assert isinstance(comm, Communicator)
    assert 0 <= comm.rank < comm.size
    assert comm.all_reduce(torch.tensor([float(comm.rank)])).item() == comm.size * (comm.size - 1) / 2


CHECKS = (
    rank_and_size,
    sums,
    other_shapes,
    same_bits_everywhere,
    many_in_a_row,
    refuses_what_it_cannot_sum,
    from_another_thread,
    copies_share_pickles_drop,
    says_what_it_is,
)


def conformance(comm: Communicator) -> int:
    """Run every check; return how many."""
    for check in CHECKS:
        check(comm)
    return len(CHECKS)


# ---- states: each check makes a communicator of its own, and ends it

Make = Callable[[timedelta], BaseCommunicator]
SECONDS = timedelta(seconds=2)  # of a wait in vain


def refuses_once_closed(make: Make) -> None:
    comm = make(SECONDS)
    comm.all_reduce(torch.ones(3))
    comm.close()
    comm.close()
    assert comm.state == "closed"
    assert repr(comm).endswith("closed)")
    with pytest.raises(GroupError, match=r"close\(\) was called"):
        comm.all_reduce(torch.ones(3))


def broken_by_a_peer_that_stays_away(make: Make) -> None:
    comm = make(SECONDS)
    comm.all_reduce(torch.ones(3))
    if comm.rank < comm.size - 1:
        with pytest.raises(CollectiveError, match=rf"failed on rank {comm.rank} of {comm.size} \(") as first:
            comm.all_reduce(torch.ones(3))
        stays_broken(comm, str(first.value))
    comm.close()
    assert comm.state == "closed"


def broken_by_an_interruption(make: Make) -> None:
    comm = make(SECONDS)
    comm.all_reduce(torch.ones(3))
    if comm.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs with & ignore it
        timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            comm.all_reduce(torch.ones(3))
        timer.join()
        stays_broken(comm, "all_reduce of 3 numbers was interrupted on rank 0")
    else:
        time.sleep(1.0)
        try:
            comm.all_reduce(torch.ones(3))
        except CollectiveError:  # rank 0 may have sent its part, or not
            assert comm.state == "broken"
    comm.close()


def stays_broken(comm: BaseCommunicator, why: str) -> None:
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(CollectiveError) as again:
            comm.all_reduce(torch.ones(3))
        assert time.monotonic() - start < 0.5
        assert why in str(again.value)
        assert "out of step" in str(again.value)
        assert "Start the job again" in str(again.value)
    assert comm.state == "broken"


STATES = (refuses_once_closed, broken_by_a_peer_that_stays_away, broken_by_an_interruption)


def states(make: Make, checks: tuple[Any, ...] = STATES) -> int:
    """Run every check of states; return how many."""
    for check in checks:
        check(make)
    return len(checks)
