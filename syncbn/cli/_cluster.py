"""What the ranks of a job know of themselves, what is wrong when they are put together, and a collective that works."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn._compiled import native
from syncbn._launcher import Launch
from syncbn.cluster._malloc import REMEDY, gives_memory_back
from syncbn.cluster._network import Network
from syncbn.comm import Communicator, SharedMemory, TorchDistributed
from syncbn.errors import BackendError

from ._job import plural

NUMEL = 129  # the collective of a layer of 64 channels
REPEATS = 11


@dataclass(frozen=True)
class Facts:
    """One rank."""

    rank: int
    host: str
    device: str
    device_id: str  # of the CUDA device, unique in the world; "" on the CPU
    interface: str
    address: str
    variable: str
    remedy: str  # for a wrong interface
    cores: str  # the set of cores that it may use, as a hexadecimal mask: ranks may be bound
    threads: int
    python: str
    torch: str
    syncbn: str
    compiled: str  # the instruction set of the compiled module; "" where that is missing
    kernels_setting: str  # SYNCBN_KERNELS
    shared_memory_setting: str  # SYNCBN_SHARED_MEMORY
    gives_memory_back: bool  # malloc, as it comes

    @property
    def kernels(self) -> str:
        """What works on its tensors: "composed" is plain torch operations."""
        if self.kernels_setting not in ("", "compiled"):
            return self.kernels_setting
        return "CUDA" if self.device_id else self.compiled or "composed"

    @property
    def shared_memory(self) -> bool:
        """Whether it can add CPU tensors in memory that it shares with the other ranks of its host."""
        return bool(self.compiled) and self.shared_memory_setting != "0"


def facts(launch: Launch, here: Network) -> Facts:
    """Look at this process."""
    device, device_id = "cpu", ""
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        device, device_id = f"cuda:{index}", str(torch.cuda.get_device_properties(index).uuid)
    return Facts(
        rank=launch.rank,
        host=here.host,
        device=device,
        device_id=device_id,
        interface=here.interface,
        address=here.address,
        variable=here.variable,
        remedy=here.remedy(),
        cores=hex(sum(1 << core for core in os.sched_getaffinity(0))),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        syncbn=syncbn.__version__,
        compiled="" if native is None else native.instruction_sets()[0],
        kernels_setting=os.environ.get("SYNCBN_KERNELS", ""),
        shared_memory_setting=os.environ.get("SYNCBN_SHARED_MEMORY", ""),
        gives_memory_back=gives_memory_back(os.environ),
    )


@dataclass(frozen=True)
class Finding:
    """Something wrong: an "error" makes the cluster unfit, a "warning" or a "hint" does not."""

    severity: str
    text: str


def findings(world: Sequence[Facts]) -> list[Finding]:
    """Compare the ranks. Pure."""
    return [*_versions(world), *_devices(world), *_addresses(world), *_cores(world), *_paths(world), *_malloc(world)]


def by_host(world: Iterable[Facts]) -> dict[str, list[Facts]]:
    """Group the ranks by host."""
    groups = defaultdict(list)
    for rank in world:
        groups[rank.host].append(rank)
    return dict(groups)


def _ranks(group: Iterable[Facts]) -> str:
    """Name ranks, not all of many."""
    numbers = [str(rank.rank) for rank in group]
    shown = numbers if len(numbers) <= 8 else [*numbers[:7], f"... ({len(numbers)} in all)"]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(shown)}"


def _versions(world: Sequence[Facts]) -> Iterable[Finding]:
    for name in ("python", "torch", "syncbn"):
        groups = defaultdict(list)
        for rank in world:
            groups[getattr(rank, name)].append(rank)
        if len(groups) > 1:
            each = "; ".join(f"{version} on {_ranks(group)}" for version, group in groups.items())
            yield Finding("error", f"different versions of {name}: {each}. Install the same everywhere")


def _devices(world: Sequence[Facts]) -> Iterable[Finding]:
    groups = defaultdict(list)
    for rank in world:
        if rank.device_id:
            groups[rank.host, rank.device_id].append(rank)
    for (host, _), group in groups.items():
        if len(group) > 1:
            yield Finding(
                "error",
                f"{_ranks(group)} share one CUDA device ({group[0].device} on {host}): start as many processes per "
                "node as it has devices, or check CUDA_VISIBLE_DEVICES",
            )
    kinds = {bool(rank.device_id) for rank in world}
    if len(kinds) > 1:
        without = [rank for rank in world if not rank.device_id]
        yield Finding(
            "error",
            f"{_ranks(without)} without a CUDA device, others have one: check drivers and the build of torch there",
        )


def _addresses(world: Sequence[Facts]) -> Iterable[Finding]:
    hosts = by_host(world)
    if len(hosts) == 1:
        return
    for host, group in hosts.items():
        first = group[0]
        if first.variable and first.address.startswith("127."):
            text = f"host {host} ({_ranks(group)}) uses interface {first.interface}, which is loopback"
            yield Finding("error", f"{text}: {first.remedy}")


def _cores(world: Sequence[Facts]) -> Iterable[Finding]:
    for host, group in by_host(world).items():
        cores = 0
        for rank in group:
            cores |= int(rank.cores, 16)
        threads = sum(rank.threads for rank in group)
        if threads > cores.bit_count():
            most = cores.bit_count() // len(group)
            remedy = f"set OMP_NUM_THREADS={most}" if most else "start fewer ranks there"
            text = f"host {host}: {len(group)} ranks with {threads} threads on {plural(cores.bit_count(), 'core')}"
            yield Finding("warning", f"{text}, so they wait for one another: {remedy}")


def _paths(world: Sequence[Facts]) -> Iterable[Finding]:
    """Ranks on different paths compute the same, at different speeds."""
    composed = [rank for rank in world if rank.kernels == "composed"]
    if len(composed) < len(world):
        turned_off = [rank for rank in composed if rank.kernels_setting == "composed"]
        missing = [rank for rank in composed if rank not in turned_off]
        slow = "in plain torch operations, several times slower, and the others wait for it"
        if turned_off:
            text = f"{_ranks(turned_off)}: SYNCBN_KERNELS=composed has the layers computed {slow}: unset it there"
            yield Finding("warning", text)
        if missing:
            text = (
                f"{_ranks(missing)}: without the compiled kernels the layers are computed {slow}, without shared memory"
            )
            remedy = "reinstall syncbn there with a C++ compiler and without SYNCBN_BUILD_NATIVE=0"
            yield Finding("warning", f"{text}: {remedy}")
    apart = [rank for rank in world if rank.shared_memory_setting == "0"]
    over_gloo = world[0].variable == "GLOO_SOCKET_IFNAME"  # MPI and Horovod have ways of their own
    if over_gloo and apart and len(apart) < len(world) and not all(rank.device_id for rank in world):
        text = (
            f"{_ranks(apart)}: SYNCBN_SHARED_MEMORY=0, so that CPU tensors reach the other ranks of the host by sockets"
        )
        yield Finding("warning", f"{text}: unset it there")


def _malloc(world: Sequence[Facts]) -> Iterable[Finding]:
    slow = [rank for rank in world if rank.gives_memory_back and not rank.device_id]
    if slow:
        text = f"{_ranks(slow)}: malloc gives the memory of large tensors back, and each step fetches it anew"
        yield Finding("hint", f"{text}: {REMEDY}")


@dataclass(frozen=True)
class Collective:
    """One communicator's all-reduce.

    Attributes:
        name: of the communicator.
        device: of the tensor.
        seconds: median over some repeats, of the slowest rank; None if it did not run.
        note: why it did not, or what went wrong.
        failed: whether that makes the cluster unfit.
    """

    name: str
    device: str = "cpu"
    seconds: float | None = None
    note: str = ""
    failed: bool = False


def collectives(comm: Communicator, launch: Launch, world: Sequence[Facts], timeout: timedelta) -> Iterable[Collective]:
    """Run an all-reduce over each communicator that there is. Every rank makes the same calls: it knows the same facts.

    Raises:
        CollectiveError: a peer is lost.
    """
    name = type(comm).__name__
    yield _measured(name, comm.all_reduce, comm.rank, comm.size, "cpu")
    if all(rank.device_id for rank in world):
        # NCCL refuses, or hangs, where two ranks share a device.
        shared = list(_devices(world))
        yield (
            Collective(name, "cuda", note=shared[0].text, failed=True)
            if shared
            else _measured(name, comm.all_reduce, comm.rank, comm.size, "cuda")
        )
    if isinstance(comm, TorchDistributed):
        yield _measured("gloo alone", _all_reduce, comm.rank, comm.size, "cpu")
    yield _within_hosts(comm, world, timeout)
    for other, launcher in (("TorchDistributed", "torchrun"), ("MPI", "mpirun"), ("Horovod", "horovodrun")):
        if other != name:
            yield Collective(other, note=f"only under {launcher}: syncbn launch {launcher} ... -- -m syncbn doctor")


def _all_reduce(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def _within_hosts(comm: Communicator, world: Sequence[Facts], timeout: timedelta) -> Collective:
    name = "SharedMemory (each host)"
    parts = [[rank.rank for rank in group] for group in by_host(world).values()]
    if len(parts) == comm.size:
        return Collective(name, note="one rank a host: nothing to share")
    without = [rank for rank in world if not rank.shared_memory]
    if without:
        return Collective(name, note=f"not compiled, or SYNCBN_SHARED_MEMORY=0, on {_ranks(without)}")
    try:
        within = SharedMemory(comm, parts, timeout=timeout)
    except BackendError as error:  # on every rank
        return Collective(name, note=f"{error}: sockets are used instead; look at the limits of the container")
    with contextlib.closing(within):
        return _measured(name, within.all_reduce, within.rank, within.size, "cpu")


def _measured(name: str, all_reduce: Callable[[Tensor], Tensor], rank: int, size: int, device: str) -> Collective:
    """Sum vectors whose sum is known exactly, some times. A wrong one is reported after the last: peers count along."""
    ramp = torch.arange(1, NUMEL + 1, dtype=torch.float64, device=device)
    expected = ramp * (size * (size + 1) // 2)
    seconds, wrong = [], ""
    for repeat in range(REPEATS):
        x = ramp * (rank + 1)
        start = time.perf_counter()
        total = all_reduce(x)
        if not torch.equal(total, expected):  # waits for the device, too
            wrong = f"wrong sum: expected {expected[0].item():g}, ..., got {total.flatten()[0].item():g}, ..."
        seconds += [time.perf_counter() - start] if repeat else []  # the first sets up connections
    return Collective(name, device, statistics.median(seconds), wrong, bool(wrong))


def merged(by_rank: Sequence[Sequence[Collective]]) -> list[Collective]:
    """Make one list of every rank's: the slowest time, and the failures with the ranks' numbers. Pure."""
    return [_merge(outcomes) for outcomes in zip(*by_rank, strict=True)]


def _merge(outcomes: Sequence[Collective]) -> Collective:
    first = outcomes[0]
    failures = {rank: outcome.note for rank, outcome in enumerate(outcomes) if outcome.failed}
    note = "; ".join(f"rank {rank}: {text}" for rank, text in list(failures.items())[:4]) or first.note
    times = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    return Collective(first.name, first.device, max(times, default=None), note, bool(failures))
