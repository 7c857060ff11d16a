"""torchrun, on one host or as one of several that run the same command."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from ._addresses import HostError, head
from ._command import BARE, Command, omp, slurm_port, threads_each
from ._malloc import keep_memory
from ._options import WAIT, JobOptions, at_least, option, port

DESCRIPTION = """Run a training script in N ranks on this host, or on each of M hosts, started by PyTorch's torchrun.
For several hosts give the same command on each, within --timeout. HOST is the head node: one of them, that the others
can connect to.

example: --nodes 2 --procs-per-node 2 --master node1 -- examples/detect_digits.py --steps 50"""


@dataclass(frozen=True, kw_only=True)
class Torchrun(JobOptions):
    """Its options."""

    procs_per_node: int = option("ranks to start on a host", metavar="N", convert=at_least(1))
    nodes: int = option("hosts (1)", 1, metavar="M", convert=at_least(1))
    master: str = option("name or address of the head node", "", metavar="HOST")
    port: int | None = option(
        "a free port of the head node (20000 + SLURM_JOB_ID %% 10000 in a SLURM job, else 29400)",
        None,
        metavar="P",
        convert=port,
    )
    timeout: int = option(WAIT, 300, metavar="SECONDS", convert=at_least(1))
    max_restarts: int = option(
        "how often all ranks are started again after one has failed (0); a host that was lost may then come back, by "
        "the same command",
        0,
        metavar="R",
        convert=at_least(0),
    )


def torchrun(options: Torchrun) -> Command:
    """Return the command.

    Raises:
        HostError: there is no torch, or the head node cannot be meant, or cannot be reached.
    """
    if find_spec("torch") is None:
        raise HostError(f"{sys.executable} has no PyTorch: activate an environment with torch, or run launch/setup.sh")
    settings = {
        **omp(threads_each(options.procs_per_node)),
        **keep_memory(os.environ),
        # With one store for rendezvous and workers, ranks that are started again read the addresses of dead ones:
        # pytorch#167288.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    ranks = (
        f"--nproc-per-node={options.procs_per_node}",
        f"--max-restarts={options.max_restarts}",
        *("--no-python", *BARE, "rank"),  # Python with the script, by way of _main.become_rank
    )
    if options.nodes == 1:
        # Gloo would go by the address of the host's own name, which may be another host's or none. All ranks are on
        # this one. (NCCL looks at the interfaces, not at the name.)
        settings["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
        # --standalone: a rendezvous of its own on a free port, so that jobs on one host do not meet.
        # --local-addr: ranks would else look for rank 0 by the host's own name, for ever where that stands for nothing.
        return Command((*BARE, "agent", "--", "--standalone", "--local-addr=127.0.0.1", *ranks), settings)
    if not options.master:
        raise HostError(
            f"{options.nodes} hosts need --master HOST, the name or address of one that the others can connect to"
        )
    there = head(options.master, options.interface)
    # One name: Gloo would want each of several to be there. The second =: NCCL would else take it for a prefix.
    settings |= {"GLOO_SOCKET_IFNAME": there.mine.name, "NCCL_SOCKET_IFNAME": f"={there.mine.name}"}
    number = options.port or slurm_port() or 29400
    meeting = [
        *("--head", there.address, "--port", str(number), "--address", there.mine.address),
        *("--nodes", str(options.nodes), "--timeout", str(options.timeout)),
        *(() if there.listen is None else ("--listen", there.listen)),
    ]
    rendezvous = [
        f"--nnodes={options.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={there.address}:{number}",
        f"--rdzv-id={os.environ.get('SLURM_JOB_ID') or 'syncbn'}",
        # is_host: never, as the head node's agent has the store already. join_timeout: ten minutes, else.
        f"--rdzv-conf=is_host=0,join_timeout={options.timeout}",
        # What this host announces to the others if rank 0 is here; its own name, else.
        f"--local-addr={there.mine.address}",
    ]
    return Command((*BARE, "agent", *meeting, "--", *rendezvous, *ranks), settings)
