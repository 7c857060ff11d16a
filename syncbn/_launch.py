"""Which launcher started this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import LaunchError

Environment = Mapping[str, str]


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
        return Launch(**{**vars(launch), "agents": number(env, "GROUP_WORLD_SIZE", default=1)})
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
        number(env, rank, launcher=launcher),
        number(env, size, launcher=launcher),
        number(env, local_rank, default=0),
        variables=(rank, size, local_rank),
    )
    if not 0 <= launch.rank < launch.size or not 0 <= launch.local_rank < launch.size:
        given = ", ".join(f"{name}={env.get(name, 'unset')}" for name in launch.variables)
        raise LaunchError(f"impossible numbers from {launcher}: {given}; unset them, or start the job with {launcher}")
    return launch


def number(env: Environment, name: str, *, default: int | None = None, launcher: str = "the launcher") -> int:
    """Return the value of a variable; a LaunchError if it is none."""
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
