"""Which launcher started this process, and the world that follows from it."""

from __future__ import annotations

import atexit
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .comm import MPI, Horovod, SingleProcess, TorchDistributed
from .comm._distributed import _timeout_of as timeout_of
from .comm._groups import set_world, world
from .comm._protocol import BaseCommunicator
from .comm._verdict import choose as choose_check
from .comm._watchdog import start as start_watchdog
from .comm._watchdog import threshold
from .errors import BackendError, LaunchError

Environment = Mapping[str, str]

DEFAULT_TIMEOUT = timedelta(minutes=10)
BACKENDS = ("nccl", "gloo", "mpi", "horovod")


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process.

    Attributes:
        launcher: "horovodrun", "torchrun", "mpirun", "srun" or "none".
        rank: 0 <= rank < size.
        size: number of processes.
        local_rank: number among the processes of this host.
        agents: processes of this launcher that were started by an outer one (torchrun: one on each node); else None.
        variables: the names that were read, for messages.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    agents: int | None = None
    variables: tuple[str, ...] = ()


def detect(env: Environment) -> Launch:
    """Tell which launcher started this process. Pure: reads `env` alone.

    The innermost launcher wins; the order is horovodrun, torchrun (or RANK and WORLD_SIZE set by hand), mpirun (Open
    MPI, MPICH), a SLURM step, nothing. An sbatch script that runs mpirun has SLURM's variables and Open MPI's: mpirun
    started the process.

    Raises:
        LaunchError: a launcher's variables are incomplete or impossible, or those of two launchers contradict each
            other (two jobs of one where one job of two was meant). The message names the variables.
    """
    found = [launch for reader in (_horovodrun, _torchrun, _mpirun, _srun) if (launch := reader(env)) is not None]
    if not found:
        return Launch("none")
    for outer in found[1:]:
        _check_nesting(found[0], outer)
    return found[0]


def _horovodrun(env: Environment) -> Launch | None:
    return _read(env, "horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK")


def _torchrun(env: Environment) -> Launch | None:
    launch = _read(env, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if launch is not None and "TORCHELASTIC_RUN_ID" in env:
        return Launch(**{**vars(launch), "agents": _number(env, "GROUP_WORLD_SIZE", default=1)})
    return launch


def _mpirun(env: Environment) -> Launch | None:
    return _read(env, "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK") or (
        # MPICH's own launcher. srun --mpi=pmi2 sets PMI_RANK too, but not the local rank: that is a SLURM step.
        _read(env, "mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID") if "MPI_LOCALRANKID" in env else None
    )


def _srun(env: Environment) -> Launch | None:
    # SLURM_NTASKS belongs to the job and is there in a batch script, too, where no step runs.
    if "SLURM_STEP_NUM_TASKS" not in env:
        return None
    return _read(env, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def _read(env: Environment, launcher: str, rank: str, size: str, local_rank: str) -> Launch | None:
    """Read one launcher's three variables; None if it is not there, an error if it is only half there."""
    if rank not in env and size not in env:
        return None
    launch = Launch(
        launcher,
        _number(env, rank, launcher=launcher),
        _number(env, size, launcher=launcher),
        _number(env, local_rank, default=0),
        variables=(rank, size, local_rank),
    )
    if not 0 <= launch.rank < launch.size or not 0 <= launch.local_rank < launch.size:
        given = ", ".join(f"{name}={env.get(name, 'unset')}" for name in launch.variables)
        raise LaunchError(f"impossible numbers from {launcher}: {given}; unset them, or start the job with {launcher}")
    return launch


def _number(env: Environment, name: str, *, default: int | None = None, launcher: str = "the launcher") -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        came = "is not set" if text is None else f"is {text!r}, not a number"
        raise LaunchError(
            f"{name} {came}, although other variables of {launcher} are set: unset them, or start the job "
            f"with {launcher}"
        )
    return int(text)


def _check_nesting(inner: Launch, outer: Launch) -> None:
    """Refuse nested launchers that do not make one job."""
    both = " inside ".join(
        f"{launch.launcher} ({', '.join(launch.variables[:2])}: rank {launch.rank} of {launch.size})"
        for launch in (inner, outer)
    )
    if outer.size == 1 or (inner.launcher, outer.launcher) == ("mpirun", "srun"):
        return  # Open MPI starts its daemons with srun, one a node
    if inner.agents is not None:
        if inner.agents != outer.size:
            raise LaunchError(
                f"{both}: {outer.size} torchruns make {inner.agents} node(s) each (GROUP_WORLD_SIZE), so separate jobs;"
                f" give torchrun --nnodes {outer.size}, or unset the outer launcher's variables"
            )
    elif (inner.rank, inner.size) != (outer.rank, outer.size):
        raise LaunchError(f"{both}: use one launcher, or unset the variables of the other")


def init(
    backend: str | None = None,
    *,
    timeout: timedelta = DEFAULT_TIMEOUT,
    check: bool | None = None,
    watchdog: timedelta | None = None,
) -> BaseCommunicator:
    """Join the world that the launcher made, and return its communicator.

    =============  ======================================  ==================================
    started by     communicator                            device
    =============  ======================================  ==================================
    horovodrun     `Horovod`                               `cuda:<local rank>` where CUDA is
    torchrun       `TorchDistributed`, NCCL where CUDA is  the same
                   (with Gloo for CPU tensors), else Gloo
    mpirun         `MPI` (mpi4py)                          the same
    srun           as torchrun                             the same
    nothing        `SingleProcess`                         unchanged
    =============  ======================================  ==================================

    The device is made current (`torch.cuda.set_device`), so `torch.device("cuda")` is it. Calling `init` again returns
    the same world; where torch.distributed is initialised already, that is it. What `init` started ends with
    the communicator's `close()`, after which `init` makes the world anew, or at exit.

    Args:
        backend: None for the table; "nccl" or "gloo" for torch.distributed (under mpirun or horovodrun set MASTER_ADDR
            and MASTER_PORT), "mpi" for mpi4py, "horovod".
        timeout: how long a rank waits for its peers, in each collective and to meet them.
        check: what is done about ranks that ask for different sums, another layer or another call: see
            `MismatchError`. None: the error, on every rank; over shared memory, Gloo and MPI it takes no message, over
            NCCL and Horovod three numbers more in each vector. True: over NCCL and Horovod also a sum of three numbers
            before each, which every rank waits for, so that vectors of different lengths are seen. False: a warning,
            the 1st, 2nd, 4th, ... time, for jobs whose ranks differ on purpose. SYNCBN_CHECK=1 and 0 in the environment
            say the same. The same on every rank.
        watchdog: a rank that waits for longer than this in one sum says so on stderr, and one of them prints where
            every rank is: in which sum, at which line of other code, stopped, or gone; again after twice, four times as
            long. None: 60 s, or half of a `timeout` below that; `timedelta(0)`: no watchdog. SYNCBN_WATCHDOG, seconds,
            in the environment says the same. It costs each process a thread that writes a line to a store once a
            second: torch.distributed's own (a world that you made over another than a TCPStore has no watchdog), or
            with MPI and Horovod one that rank 0 serves. With these two it also ends a wait, after about two seconds,
            for a rank that has ended, and with Horovod one of ranks that ask for vectors of different lengths. Starting
            it takes a sum of one number, with MPI and Horovod three. With Horovod elastic only a call of `init` within
            the function that `hvd.elastic.run` wraps starts it, which every rank makes.

    Raises:
        LaunchError: the environment is contradictory or incomplete; `backend` is unknown, does not fit, or is not that
            of the world that there is; a rank cannot reach the watchdog's store.
        BackendError: mpi4py or horovod is missing.
        InputError: `watchdog` is not below the timeout, or SYNCBN_CHECK or SYNCBN_WATCHDOG is not what it may be.

    Example:
        >>> init().size
        1
    """
    choose_check(check)
    if backend is not None and backend not in BACKENDS:
        raise LaunchError(f"unknown backend {backend!r}: expected None or one of {BACKENDS}")
    joined = world()
    if not isinstance(joined, SingleProcess):  # by us or by the user
        _check_backend(joined, backend)
        start_watchdog(joined, threshold(watchdog, _timeout_of(joined) or timeout))
        return joined
    patience = threshold(watchdog, timeout)
    launch = detect(os.environ)
    _select_device(launch)
    comm = _join(launch, backend or _default_backend(launch), timeout)
    if isinstance(comm, SingleProcess):
        return comm
    if "HOROVOD_ELASTIC" not in os.environ:  # there the others may go on without a call: a new rank would wait for them
        try:
            start_watchdog(comm, patience)
        except LaunchError:
            comm.close()
            raise
    return set_world(comm)


def _timeout_of(joined: BaseCommunicator) -> timedelta | None:
    """Return how long a rank waits in the world that there is, where that can be found out."""
    if isinstance(joined, (MPI, Horovod)):
        return joined.timeout
    if isinstance(joined, TorchDistributed) and joined.takes(torch.device("cpu")):
        return timeout_of(joined.group)
    return None


def _check_backend(joined: BaseCommunicator, backend: str | None) -> None:
    if backend is not None and backend not in joined.backends:
        there = " and ".join(sorted(joined.backends))
        raise LaunchError(
            f"init({backend!r}), but this process is in a world of {there} already: {joined!r}. "
            "Leave the backend out to use that one, or end it first (syncbn.world().close(), or as you made it)"
        )


def _default_backend(launch: Launch) -> str:
    if launch.launcher == "none":
        return "none"
    if launch.launcher in ("horovodrun", "mpirun"):
        return {"horovodrun": "horovod", "mpirun": "mpi"}[launch.launcher]
    return "nccl" if torch.cuda.is_available() else "gloo"


def _join(launch: Launch, backend: str, timeout: timedelta) -> BaseCommunicator:
    if backend == "none":
        return world()
    if backend == "horovod":
        return _join_horovod(launch, timeout)
    comm = MPI(timeout=timeout) if backend == "mpi" else _join_torch(launch, backend, timeout)
    if comm.size != launch.size:
        comm.close()
        remedy = "start the job with that backend's launcher, or with the MPI that mpi4py loads"
        if launch.launcher == "srun":  # whose --mpi is "none" on most clusters: MPI then makes a world of each task
            remedy = "start it with `syncbn launch mpirun` in an sbatch script, or with srun --mpi=pmix (MPICH: pmi2)"
        raise LaunchError(
            f"{launch.launcher} started {launch.size} processes ({', '.join(launch.variables)}) but the {backend} "
            f"world has {comm.size}: {remedy}"
        )
    return comm


def _join_horovod(launch: Launch, timeout: timedelta) -> Horovod:
    if launch.launcher not in ("horovodrun", "none"):
        raise LaunchError(f"backend 'horovod' under {launch.launcher}: start the job with horovodrun")
    return Horovod.init(timeout)


def _join_torch(launch: Launch, backend: str, timeout: timedelta) -> TorchDistributed:
    if not dist.is_available():
        raise BackendError("this torch is built without torch.distributed: install another build, or use MPI")
    # With NCCL, Gloo takes the CPU tensors: the state of a model that stays on the host can be communicated, too.
    name = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    store = _store(launch, timeout)
    dist.init_process_group(name, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
    atexit.unregister(_leave)
    atexit.register(_leave)
    comm = TorchDistributed(timeout=timeout, own_group=True)
    comm.owns_group = True
    return comm


_generation = 0  # of worlds that this process has joined
_stores: dict[str, Any] = {}  # by meeting point


def _store(launch: Launch, timeout: timedelta) -> Any:
    """Return a store of this world's own.

    Where ranks meet again, under torchrun for one, the keys of the world before, the addresses of its ranks, are still
    there: hence a prefix. The connection is kept, since rank 0 may serve the store: a rank that comes back at once
    would else find the old server, just before it ends.
    """
    global _generation
    if launch.launcher == "none":
        return dist.HashStore()  # type: ignore[attr-defined]
    where = _meeting_point(launch, os.environ)
    if where not in _stores:
        _stores[where], _, _ = next(dist.rendezvous(where, launch.rank, launch.size, timeout=timeout))  # type: ignore[attr-defined]
        _stores[where].set_timeout(timeout)
    _generation += 1
    return dist.PrefixStore(f"syncbn {_generation}", _stores[where])  # type: ignore[attr-defined]


def _leave() -> None:
    """End the process groups: Gloo joins its threads when the last reference goes.

    A thread of its that waits for the interpreter, to free the tensors of the last collective, while that ends already
    would abort the process. The pause serves those whose group the user still holds (DDP does).
    """
    if os.getpid() != _pid or not dist.is_initialized():  # a forked child has no such threads
        return
    dist.destroy_process_group()
    world()  # which notices
    _stores.clear()
    time.sleep(0.02)


_pid = os.getpid()


def _meeting_point(launch: Launch, env: Environment) -> str:
    """Return the init method for torch.distributed: what MASTER_ADDR says, else the SLURM step's first host."""
    if launch.launcher == "torchrun" and "TORCHELASTIC_RUN_ID" in env:
        return "env://"  # torchrun serves the store there, and tells so in further variables
    if launch.launcher == "srun":
        address = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", ""))
        # `syncbn launch slurm-rank` comes to the same number; the system gives those from 32768 on to clients.
        port = env.get("MASTER_PORT") or str(20000 + _number(env, "SLURM_JOB_ID", launcher="srun") % 10000)
        return f"tcp://{address}:{port}"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise LaunchError(
            f"torch.distributed under {launch.launcher} needs {' and '.join(missing)}: export the address of rank 0 "
            "and a free port there, or use the backend of the launcher"
        )
    return "env://"


def _first_host(nodelist: str) -> str:
    """Return the first name in SLURM's compressed list.

    Example:
        >>> _first_host("gpu[07-09,12],login1"), _first_host("node3")
        ('gpu07', 'node3')
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise LaunchError(f"SLURM_STEP_NODELIST is {nodelist!r}: export MASTER_ADDR, the address of rank 0's host")
    return "".join(part or "" for part in match.groups())


def _select_device(launch: Launch) -> None:
    """Make the local rank's CUDA device current."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 or launch.launcher == "none":
        return
    if launch.local_rank >= count > 1:
        raise LaunchError(
            f"local rank {launch.local_rank} ({launch.variables[2]}) has no CUDA device, {count} are visible: start as "
            "many processes per node as there are devices, or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(launch.local_rank if count > 1 else 0)  # one visible device: the launcher bound it
