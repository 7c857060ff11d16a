"""The shared-memory all-reduce over real processes: sums, faults, and the two levels over several "hosts"."""

from __future__ import annotations

import gc
import logging
import logging.handlers
import os
import random
import resource
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance import CHECKS, conformance
from conftest import GlooPool

from syncbn._compiled import native
from syncbn.comm import Communicator, SharedMemory, TorchDistributed, _shared_memory, run_threads
from syncbn.comm._hosts import hosts
from syncbn.errors import BackendError, CollectiveError, GroupError

pytestmark = pytest.mark.skipif(not hasattr(native, "SharedMemory"), reason="syncbn._native is missing: pip install .")

BUFFER = 64 << 10  # bytes that go through in one piece
SHARED, TWO_LEVELS = "shared memory", "shared memory within hosts, gloo between"


def shared(seconds: float = 20, **kwargs: Any) -> SharedMemory:
    return SharedMemory(TorchDistributed(), timeout=timedelta(seconds=seconds), **kwargs)


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


# ---- sums


def _conformance(rank: int, size: int, way: str) -> str:
    with patched() as patch:
        patch.setenv("SYNCBN_SHARED_MEMORY", "0" if way == "off" else "1")
        comm = shared() if way == "direct" else TorchDistributed()
        assert conformance(comm) == len(CHECKS)
        return comm.transport


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("way", "expected"), [("direct", SHARED), ("on", SHARED), ("off", "gloo")])
def test_conformance(gloo, size: int, way: str, expected: str) -> None:
    assert gloo(size, _conformance, way) == [expected] * size


@pytest.mark.parametrize("size", [2, 5])
def test_conformance_over_threads(size: int) -> None:
    """Also shows that the wait releases the GIL."""
    assert run_threads(size, lambda comm: conformance(SharedMemory(comm))) == [len(CHECKS)] * size


def random_lengths(comm: Communicator, rounds: int, longest: int = 300) -> None:
    """The sum in rank order, to the bit; lengths, dtypes, speeds vary."""
    together, alone = random.Random(0), random.Random(comm.rank)
    numbers = [torch.randn(longest, generator=torch.Generator().manual_seed(r)).double() for r in range(comm.size)]
    for _ in range(rounds):
        length, dtype = together.randrange(longest + 1), together.choice((torch.float32, torch.float64))
        scale = together.random()
        terms = [(scale * part[:length]).to(dtype) for part in numbers]
        if alone.random() < 0.01:
            time.sleep(alone.random() * 1e-3)
        assert torch.equal(comm.all_reduce(terms[comm.rank].clone()), sum(terms[1:], terms[0]))


def _random_lengths(rank: int, size: int, rounds: int, longest: int) -> None:
    random_lengths(shared(), rounds, longest)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_long_run_is_bit_equal(gloo, size: int) -> None:
    gloo(size, _random_lengths, int(os.environ.get("SYNCBN_TEST_ROUNDS", "2000")), 300)


@pytest.mark.parametrize("size", [2, 3])
def test_vectors_longer_than_the_buffer(gloo, size: int) -> None:
    gloo(size, _random_lengths, 100, 3 * BUFFER // 8)


def _edges_of_the_buffer(rank: int, size: int) -> None:
    comm = shared()
    for dtype in (torch.float32, torch.float64):
        full = BUFFER // dtype.itemsize
        for length in (full - 1, full, full + 1, 2 * full, 2 * full + 1):
            x = torch.arange(length).to(dtype)
            assert torch.equal(comm.all_reduce(x.clone()), size * x)


def test_the_edges_of_the_buffer(gloo) -> None:
    gloo(2, _edges_of_the_buffer)


def _on_cores(rank: int, size: int, cores: int) -> float:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        comm, start = shared(), time.perf_counter()
        random_lengths(comm, 500)
        return time.perf_counter() - start
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("cores", [1, 2])
def test_more_ranks_than_cores(gloo, cores: int) -> None:
    """Ranks that wait awake for a rank that has no core would take a time slice, several ms, per sum."""
    assert max(gloo(4, _on_cores, cores)) < 8


def _many_at_once(rank: int, size: int) -> None:
    world = shared()
    parts = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1], [2]], [[0, 1, 2, 3]]]
    comms = [world, *(shared(partition=part) for part in parts), world.split(parts[0])]
    assert [c.size for c in comms[1:]] == [2, 2, 2 if rank in (0, 3) else 1, 4, 2]
    order = random.Random(0)
    for _ in range(1000):
        comm = order.choice(comms)
        assert comm.all_reduce(torch.ones(3)).tolist() == [comm.size] * 3


def test_many_communicators_at_once(gloo) -> None:
    gloo(4, _many_at_once)


def test_a_world_of_one_needs_no_memory() -> None:
    assert run_threads(1, lambda comm: SharedMemory(comm).all_reduce(torch.ones(2)).tolist()) == [[1, 1]]


def test_tensors_elsewhere_are_refused() -> None:
    def refuses(comm: Communicator) -> None:
        with pytest.raises(GroupError, match="CPU tensors only, got one on meta"):
            SharedMemory(comm).all_reduce(torch.ones(3, device="meta"))

    run_threads(2, refuses)


def _leaves_nothing(rank: int, size: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    comm = shared()
    comm.all_reduce(torch.ones(3))
    assert names_of_our_memory() == {"/memfd:syncbn (deleted)"}
    mapped = Path("/proc/self/maps").read_text().count("memfd:syncbn")
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    del comm
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("memfd:syncbn") == mapped - 1
    assert len(os.listdir("/proc/self/fd")) == descriptors


def names_of_our_memory() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line[line.index("/") :] for line in lines if "memfd:" in line}


def test_the_memory_has_no_name_and_goes_with_its_communicator(gloo) -> None:
    gloo(2, _leaves_nothing)


def _forks(rank: int, size: int) -> int:
    comm = shared()
    comm.all_reduce(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            comm.all_reduce(torch.ones(3))
        except CollectiveError:
            del comm
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    random_lengths(comm, 200)
    return status


def test_a_forked_child_is_refused_and_does_no_harm(gloo) -> None:
    assert gloo(2, _forks) == [0, 0]


# ---- faults


def _different(rank: int, size: int, lengths: list[int], dtypes: list[torch.dtype]) -> str:
    comm = shared()
    with pytest.raises(CollectiveError) as caught:
        comm.all_reduce(torch.ones(lengths[rank], dtype=dtypes[rank]))
    with pytest.raises(CollectiveError, match="ranks are out of step") as again:  # for good
        comm.all_reduce(torch.ones(3))
    assert str(caught.value) in str(again.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "dtypes", "sent"),
    [
        ((3, 4, 3), ("float32",) * 3, ["ranks 0, 2: {} (3 x float32)", "rank 1: {} (4 x float32)"]),
        ((8, 8, 4), ("float32", "float32", "float64"), ["ranks 0, 1: {} (8 x float32)", "rank 2: {} (4 x float64)"]),
        (
            (0, 50_000, 1),
            ("float64",) * 3,
            ["rank 0: {} (0 x float64)", "rank 1: {} (50000 x float64)", "rank 2: {} (1 x float64)"],
        ),
    ],
)
def test_different_vectors_are_the_same_error_everywhere(gloo, lengths, dtypes, sent) -> None:
    errors = gloo(3, _different, lengths, [getattr(torch, dtype) for dtype in dtypes])
    lines = [line.format("all_reduce, call 1") for line in sent]
    assert errors == ["\n".join(["the ranks ask for different sums", *lines])] * 3


def _one_stays_away(rank: int, size: int) -> tuple[str, float]:
    comm = shared(1.5)
    start, message = time.monotonic(), "stayed away"
    if rank != 1:
        with pytest.raises(CollectiveError) as caught:
            comm.all_reduce(torch.ones(3))
        message = str(caught.value)
    seconds = time.monotonic() - start
    dist.barrier()
    return message, seconds


def test_a_rank_that_never_calls_is_named_after_the_deadline(gloo) -> None:
    answers = gloo(3, _one_stays_away)
    for rank in (0, 2):
        message, seconds = answers[rank]
        assert message.startswith(
            f"in all_reduce, call 1: all_reduce of 3 numbers failed on rank {rank} of 3 (shared memory): a peer died"
        )
        assert "in time: rank 1 (pid " in message
        assert message.endswith("did not call within 1.5 s")
        assert 1.5 <= seconds < 4


def _gives_up(rank: int, size: int) -> str:
    comm = shared(0.3 if rank == 0 else 20)
    if rank == 0:
        with pytest.raises(CollectiveError, match=r"rank 1 .* did not call within 0\.3 s"):
            comm.all_reduce(torch.ones(3))
    dist.barrier()
    start = time.monotonic()
    if rank == 1:
        comm.all_reduce(torch.ones(3))  # rank 0 had sent its part of this one
    with pytest.raises(CollectiveError) as caught:
        comm.all_reduce(torch.ones(3))
    assert time.monotonic() - start < 5
    return str(caught.value)


def test_after_an_error_nobody_waits(gloo) -> None:
    here, peer = gloo(2, _gives_up)
    assert (
        "broken), since its ranks are out of step: in all_reduce, call 1: all_reduce of 3 numbers failed on rank 0"
        in here
    )
    assert "rank 0 (pid " in peer
    assert peer.endswith("has ended or given up")


def _interrupted(rank: int, size: int) -> float:
    comm, start = shared(), time.monotonic()
    if rank == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            comm.all_reduce(torch.ones(3))
    seconds = time.monotonic() - start
    dist.barrier()
    return seconds


def test_a_wait_can_be_interrupted(gloo) -> None:
    assert gloo(2, _interrupted)[0] < 5


kept: list[Communicator] = []  # by a rank of the pool, between two tasks


def _make(rank: int, size: int, names: str = "", seconds: float = 30) -> str:
    """Make a communicator and use it; `names` are the ranks' host names, a letter each."""
    with patched() as patch:
        if names:
            patch.setattr(socket, "gethostname", lambda: names[rank])
        kept[:] = [TorchDistributed(dist.new_group(), timeout=timedelta(seconds=seconds))]
        kept[0].all_reduce(torch.ones(1))
    return kept[0].transport  # type: ignore[attr-defined]


def _until_it_fails(rank: int, size: int) -> tuple[str, float]:
    """Return the message, and when."""
    try:
        while True:
            kept[0].all_reduce(torch.ones(20_000))
    except CollectiveError as error:
        return str(error), time.monotonic()


def kill_one(size: int, victim: int, *make: Any) -> tuple[dict[int, tuple[str, float]], int]:
    """Kill a rank amid collectives; return what the others raised and after how many seconds, and the victim's pid."""
    pool = GlooPool(size)
    try:
        pool.run(_make, *make)
        for _, pipe in pool.workers:
            pipe.send((_until_it_fails, ()))
        time.sleep(0.3)
        process, killed = pool.workers[victim][0], time.monotonic()
        os.kill(process.pid, signal.SIGKILL)  # not waited for: a zombie counts as ended
        answers = {rank: pool._answer(rank) for rank in range(size) if rank != victim}
        assert all(ok for ok, _ in answers.values()), answers
        return {rank: (text, when - killed) for rank, (_, (text, when)) in answers.items()}, process.pid
    finally:
        pool.stop(kill=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_at_once(victim: int) -> None:
    errors, pid = kill_one(3, victim)
    for message, seconds in errors.values():
        assert "(shared memory)" in message
        assert message.endswith(f"in time: rank {victim} (pid {pid}) has ended or given up")
        assert seconds < 3
    assert not [name for name in os.listdir("/dev/shm") if "syncbn" in name]


def test_a_killed_rank_with_two_hosts() -> None:
    """Rank 3 shares a host with rank 2, which names it; the other host learns of it from Gloo, within the timeout."""
    errors, pid = kill_one(4, 3, "aabb", 3)
    assert errors[2][0].endswith(f"rank 3 (pid {pid}) has ended or given up")
    assert errors[2][1] < 3
    assert "in time: rank 2: " in errors[0][0]
    assert "rank 0 (pid " in errors[1][0]
    assert errors[1][0].endswith("has ended or given up")  # told so, not at its own deadline
    assert max(errors[0][1], errors[1][1]) < 6


# ---- no memory to be had


@contextmanager
def no_memory(how: str) -> Iterator[None]:
    """Make the next memory fail: no room in it (for the rank that makes it), or none to map it to."""
    with patched() as patch:
        if how == "full":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            return
        if how == "unmappable":
            patch.setattr(_shared_memory, "_Memory", _unmappable)
        elif how == "not installed":
            patch.setattr(_shared_memory, "_Memory", None)
        yield


def _unmappable(*args: Any) -> None:
    raise OSError(12, "Cannot allocate memory")


def _fall_back(rank: int, size: int, victim: int, how: str) -> list[str]:
    comm = TorchDistributed()
    log, logged = logging.getLogger("syncbn"), logging.handlers.BufferingHandler(100)
    log.addHandler(logged)
    try:
        with warnings.catch_warnings(), no_memory(how if rank == victim else ""):
            warnings.simplefilter("error")  # as python -W error: rank 0 alone would raise
            conformance(comm)
    finally:
        log.removeHandler(logged)
    assert comm.transport == "gloo"
    with no_memory(how if rank == victim else ""), pytest.raises(BackendError, match="no shared memory on rank"):
        SharedMemory(comm)
    return [record.getMessage() for record in logged.buffer]


@pytest.mark.parametrize(
    ("victim", "how", "ranks", "reason"),
    [
        (0, "full", "0, 1, 2", "File too large"),
        (2, "unmappable", "2", "Cannot allocate memory"),
        (1, "not installed", "1", "Function not implemented"),
    ],
)
def test_without_memory_all_ranks_fall_back_with_one_warning(gloo, victim, how, ranks, reason) -> None:
    warned = gloo(3, _fall_back, victim, how)
    assert warned == [
        [f"no shared memory on rank {ranks} of 3: {reason}; all_reduce of CPU tensors goes through sockets, slower"],
        [],
        [],
    ]


# ---- several hosts


def _two_levels(rank: int, size: int, names: str, switch: str = "1") -> str:
    with patched() as patch:
        patch.setattr(socket, "gethostname", lambda: names[rank])
        if rank == size - 1:
            patch.setenv("SYNCBN_SHARED_MEMORY", switch)
        comm = TorchDistributed()
        conformance(comm)
    random_bits(comm)
    return comm.transport


def random_bits(comm: Communicator) -> None:
    """The same bits everywhere, over lengths that take one piece or several; a lone -0.0 becomes 0.0 everywhere."""
    for length in (1, 100, 20_000):
        total = comm.all_reduce(torch.randn(length, generator=torch.Generator().manual_seed(comm.rank)))
        everywhere = [torch.empty_like(total) for _ in range(comm.size)]
        dist.all_gather(everywhere, total)
        assert all(torch.equal(part.view(torch.int32), total.view(torch.int32)) for part in everywhere)
    assert comm.all_reduce(torch.full((3,), -0.0)).abs().max() == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [("aabb", TWO_LEVELS), ("abab", TWO_LEVELS), ("aab", TWO_LEVELS), ("abb", TWO_LEVELS), ("abc", "gloo")],
)
def test_two_levels(gloo, names: str, expected: str) -> None:
    assert gloo(len(names), _two_levels, names) == [expected] * len(names)


def test_ranks_need_not_agree_on_the_switch(gloo) -> None:
    """A rank that does without is a host of its own."""
    assert gloo(3, _two_levels, "aaa", "0") == [TWO_LEVELS] * 3


def _subgroups(rank: int, size: int, names: str) -> list[str]:
    with patched() as patch:
        patch.setattr(socket, "gethostname", lambda: names[rank])
        whole = TorchDistributed()
        parts = [whole.split([[0, 1], [2, 3]]), whole.split([[0, 2], [1, 3]]), whole.split([[0], [1, 2, 3]]), whole]
        for comm in parts:
            conformance(comm) if comm.size > 1 else None
        assert hosts(whole) == [[0, 1], [2, 3]]
        return [comm.transport for comm in parts]  # type: ignore[attr-defined]


def test_subgroups_over_two_hosts(gloo) -> None:
    answers = gloo(4, _subgroups, "aabb")
    assert answers == [[SHARED, "gloo", "gloo", TWO_LEVELS], *[[SHARED, "gloo", TWO_LEVELS, TWO_LEVELS]] * 3]
