"""Steps of a SLURM job: a task for each rank, or a torchrun on each node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ._addresses import HOST, HostError, connect, head
from ._command import BARE, Command, omp, slurm_port, threads_each, tool
from ._malloc import keep_memory
from ._options import WAIT, JobOptions, Options, at_least, option, port

DESCRIPTION = """In a batch script, or within salloc: run a training script in P ranks on each of the N nodes of the
job. Each is a task of srun, and syncbn.init() makes the world from SLURM's variables; or, with --torchrun, a torchrun
on each node starts them. A rank that fails ends the whole job, which then counts as FAILED."""
RANK = """What each task of `launch slurm` runs, for batch scripts of your own, too:

    srun --kill-on-bad-exit=1 syncbn launch slurm-rank -- train.py

Finds how this node reaches the others, and tells PyTorch and syncbn.init() by MASTER_ADDR, MASTER_PORT,
GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. A failure of the script is passed on half a second later: srun ends the other
tasks at once, and then loses what the failed one wrote last, its error message, in one of four jobs."""


@dataclass(frozen=True, kw_only=True)
class SlurmRank(Options):
    """The options of a task."""

    port: int | None = option(
        "a free port of the first node (20000 + SLURM_JOB_ID %% 10000)", None, metavar="P", convert=port
    )


@dataclass(frozen=True, kw_only=True)
class Slurm(SlurmRank, JobOptions):
    """Those of a job."""

    torchrun: bool = option("start the ranks of each node by one torchrun there", False)
    timeout: int | None = option(f"with --torchrun: {WAIT}", None, metavar="SECONDS", convert=at_least(1))
    max_restarts: int = option(
        "with --torchrun: how often all ranks are started again after one has failed (0)",
        0,
        metavar="R",
        convert=at_least(0),
    )


def slurm(options: Slurm) -> Command:
    """Return the command, `srun`.

    Raises:
        HostError: there is no allocation, or an option that only torchrun has; or torchrun is to start the ranks, and
            there are not as many tasks on each node.
    """
    if not options.torchrun and (options.max_restarts or options.timeout is not None):
        raise HostError("--timeout and --max-restarts are torchrun's: add --torchrun")
    _, nodes, tasks = _need(
        "no allocation here; sbatch --nodes 2 --ntasks-per-node 2 --wrap 'syncbn launch slurm -- SCRIPT', or a batch "
        "script that ends in that command",
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "SLURM_TASKS_PER_NODE",
    )
    hosts = _hosts(nodes)
    # --kill-on-bad-exit: the other ranks would else wait for one that failed. --export: sbatch --export=NONE would else
    # hold for the steps, too. --cpu-bind: a task, or a torchrun and its ranks, may use all cores that it was given.
    srun = ["srun", "--kill-on-bad-exit=1", "--export=ALL", "--cpu-bind=none"]
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or 0)
    handed_on = _given(interface=options.interface, port=options.port)
    if not options.torchrun:
        # srun does not take this from the job in all versions.
        srun += [f"--cpus-per-task={cpus}"] if cpus else []
        return Command((*srun, *BARE, "slurm-rank", *handed_on, "--"), {})
    ranks = int(tasks.partition("(")[0].partition(",")[0])  # 4(x2): 4 on each of 2 nodes
    total = os.environ.get("SLURM_NTASKS")
    if "," in tasks or int(total or ranks * len(hosts)) != ranks * len(hosts):
        raise HostError(
            f"expected as many tasks on each node, got SLURM_TASKS_PER_NODE={tasks} and SLURM_NTASKS={total}: give "
            "sbatch --ntasks-per-node P"
        )
    # Newer versions of srun give a torchrun, one task, only the cores of one task of the job.
    srun += [f"--cpus-per-task={ranks * cpus}"] if cpus else []
    srun += [f"--ntasks={len(hosts)}", "--ntasks-per-node=1"]
    place = _given(nodes=len(hosts), procs_per_node=ranks, master=hosts[0])
    handed_on += _given(timeout=options.timeout, max_restarts=options.max_restarts)
    return Command((*srun, *BARE, "torchrun", *place, *handed_on, "--"), {})


def _given(**options: object) -> list[str]:
    """Write options that have a value.

    Example:
        >>> _given(max_restarts=0, interface="", port=None)
        ['--max-restarts=0']
    """
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value not in ("", None)]


def _need(remedy: str, *names: str) -> list[str]:
    """Return these variables, or raise a problem."""
    for name in names:
        if not os.environ.get(name):
            raise HostError(f"{name} is not set: {remedy}")
    return [os.environ[name] for name in names]


def _hosts(compressed: str) -> list[str]:
    """Return the hosts of a list such as node[1-2]; the first is that of rank 0."""
    scontrol = tool("scontrol", f"install SLURM's client commands on {HOST}, or set PATH")
    done = subprocess.run([scontrol, "show", "hostnames", compressed], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostError(f"scontrol show hostnames {compressed!r} failed on {HOST}: {done.stderr.strip()}")
    return done.stdout.split()


def slurm_rank(options: SlurmRank) -> Command:
    """Return the command of this task.

    Raises:
        HostError: this is no step of a SLURM job, the port is taken, or the first node is out of reach.
    """
    nodes, rank, local_rank, node, ranks_here = _need(
        "this is no step of a SLURM job; start it with srun, or use `syncbn launch slurm`",
        *(f"SLURM_{name}" for name in ("STEP_NODELIST", "PROCID", "LOCALID", "NODEID", "GTIDS")),
    )
    _need("start it with srun", "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS")
    hosts = _hosts(nodes)
    number = options.port or slurm_port() or 0
    if len(hosts) == 1:
        address, interface = "127.0.0.1", "lo"
    else:
        # The first node asks for the route to the second: its own name may be 127.0.1.1, as in Debian, or mean nothing.
        there = head(hosts[1 if node == "0" else 0], options.interface)
        address = there.mine.address if node == "0" else there.address
        interface = there.mine.name
        if node != "0" and local_rank == "0":  # once a node
            connect("the head node", address, number, there.mine, refusal_counts=False)
    if rank == "0":
        _check_free(number)
    settings = {
        **omp(threads_each(len(ranks_here.split(",")))),
        **keep_memory(os.environ),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(number),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",  # without this =, NCCL would take the name for a prefix
        # Python keeps back lines that do not go to a terminal; those of a rank that is killed would be lost.
        "PYTHONUNBUFFERED": "1",
    }
    return Command((sys.executable,), settings)


def _check_free(port: int) -> None:
    """Raise a problem if another program listens there. Nothing of ours does, not even for a moment."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise HostError(
                f"port {port} of {HOST} cannot be had ({error.strerror}): another job may have it; give another --port"
            ) from error


def run_task(words: Sequence[str], env: dict[str, str]) -> int:
    """Run a task to its end, and return the status that srun shall hear of, half a second after a failure.

    SLURM signals the script, too; this waits for it. Other tasks are terminated because of one that failed: srun
    reports the highest status, and so, with the lowest here, that one's.
    """
    terminated = []
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the script would inherit
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    status = subprocess.Popen(words, env=env).wait()
    if status == 0:
        return 0
    time.sleep(0.5)
    if terminated:
        return 1
    return 128 - status if status < 0 else status
