"""horovodrun, on one host or over ssh on several."""

from __future__ import annotations

import os
import sys

from ._command import Command, omp, tool
from ._hosts import listed
from ._malloc import keep_memory
from ._over_ssh import OverSsh

DESCRIPTION = """Run a training script in N ranks on this host, or on each of several, started by horovodrun
(`syncbn install-horovod` builds it). Give the command on one host; it reaches the others by ssh, which must not ask
for a password (~/.ssh/config has its settings).

example: --hosts node1:2,node2:2 -- train.py --steps 50"""


def horovodrun(options: OverSsh) -> Command:
    """Return the command.

    Raises:
        HostError: horovodrun is missing, or a host cannot take part.
    """
    program = tool("horovodrun", "syncbn install-horovod builds it")
    ranks, threads, hosts = options.ask()
    settings = {**omp(threads), **keep_memory(os.environ)}
    # --gloo: a Horovod built with MPI would else start mpirun.
    # --gloo-timeout-seconds: how far apart ranks may reach hvd.init(). 30 s, the default, is short on a busy machine.
    # (syncbn.init sets it anew, to its own timeout.)
    words: tuple[str, ...] = (program, "-np", str(ranks), "--gloo", "--gloo-timeout-seconds", "120")
    if hosts is not None:
        # By a name that stands for nothing it would look for this host over ssh.
        from_here = {"localhost" if host == hosts.here else host: count for host, count in hosts.ranks.items()}
        words += ("-H", listed(from_here), "--network-interfaces", ",".join(hosts.interfaces))
        # --disable-cache: it would remember for an hour that a host could be reached.
        words += ("--start-timeout", str(options.timeout), "--disable-cache")
    return Command((*words, sys.executable), settings)
