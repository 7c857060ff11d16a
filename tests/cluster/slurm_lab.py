"""A SLURM cluster on the hosts of the lab: real daemons, munged and slurmctld on the first host, slurmd on each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from cluster.lab import ROOT, Host

DAEMONS = ("munged", "slurmctld", "slurmd", "slurmscriptd")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

# linuxproc and no plugin for tasks: no systemd, the machine's own cgroups. %n: the nodes share one disk.
SETTINGS = """
ClusterName=lab
SlurmctldHost={head.name}({head.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
TmpFS={folder}/tmp.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP
"""


def missing_tool() -> str | None:
    """Return which package of SLURM is missing, if one is."""
    for tool, package in {
        "slurmctld": "slurmctld",
        "slurmd": "slurmd",
        "srun": "slurm-client",
        "munged": "munge",
    }.items():
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"no {tool}: apt install {package}"
    return None


class Batch:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: str, output: Path) -> None:
        self.number = number
        self._cluster = cluster
        self._output = output

    @property
    def stdout(self) -> str:
        """What it wrote so far, to stdout and stderr."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def field(self, name: str) -> str:
        """Return a field of `scontrol show job`."""
        shown = self._cluster.head.check("scontrol", "-o", "show", "job", self.number).stdout
        return shown.partition(f" {name}=")[2].partition(" ")[0]

    @property
    def state(self) -> str:
        return self.field("JobState")

    def wait(self, seconds: float) -> Batch:
        """Wait for the end; the test fails if that takes longer."""
        deadline = time.monotonic() + seconds
        while self.state not in OVER:
            if time.monotonic() > deadline:
                pytest.fail(f"job {self.number} is {self.state} after {seconds} s:\n{self.stdout}", pytrace=False)
            time.sleep(0.1)
        return self

    def wait_for(self, text: str, seconds: float) -> Batch:
        """Wait until it has written `text`; the test fails if it ends before or that takes longer."""
        deadline = time.monotonic() + seconds
        while text not in self.stdout:
            if self.state in OVER or time.monotonic() > deadline:
                pytest.fail(f"job {self.number} ({self.state}) did not write {text!r}:\n{self.stdout}", pytrace=False)
            time.sleep(0.1)
        return self


class Cluster:
    """Hosts that SLURM gives jobs to; jobs are submitted on the first, `head`."""

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self.head = hosts[0]
        self.hosts = hosts
        self._folder = folder

    def submit(
        self, *arguments: str, tasks: int | None = 2, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> Batch:
        """Submit `sbatch` with these arguments for all hosts, `tasks` on each unless None."""
        size = ["--nodes", str(len(self.hosts)), *([] if tasks is None else ["--ntasks-per-node", str(tasks)])]
        output = ("--output", f"{self._folder}/job.%j.out")
        job = self.head.run("sbatch", "--parsable", *size, *output, *arguments, env=env, cwd=cwd)
        assert job.returncode == 0, job.stdout
        number = job.stdout.strip()
        return Batch(self, number, self._folder / f"job.{number}.out")

    def processes(self) -> list[str]:
        """Return the commands of all that runs on the hosts, but the daemons."""
        commands = [command for host in self.hosts for command in host.processes().values()]
        return [c for c in commands if Path(c.strip(": ").split()[0]).name not in DAEMONS]

    def wait_until_idle(self, seconds: float) -> float:
        """Wait until no process of a job is left on any host, and return how long that took."""
        start = time.monotonic()
        while left := self.processes():
            if time.monotonic() - start > seconds:
                pytest.fail(f"left after {seconds} s: {left}", pytrace=False)
            time.sleep(0.05)
        return time.monotonic() - start


@contextmanager
def slurm(hosts: Sequence[Host], folder: Path) -> Iterator[Cluster]:
    """Start SLURM on `hosts`. The daemons end with the hosts, and write to `folder` until then."""
    folder.chmod(0o755)
    for host in hosts:
        (folder / f"spool.{host.name}").mkdir()
        (folder / f"tmp.{host.name}").mkdir()
    (folder / "state").mkdir()
    nodes = [f"NodeName={h.name} NodeAddr={h.address} CPUs=2 RealMemory=1000 State=UNKNOWN" for h in hosts]
    (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, head=hosts[0]) + "\n".join(nodes) + "\n")
    with patch.dict(os.environ, SLURM_CONF=str(folder / "slurm.conf")):  # what runs on a host has our environment
        _start_munge(hosts[0], folder)
        hosts[0].check("slurmctld", "-i")
        for host in hosts:
            host.check("slurmd")
        cluster = Cluster(hosts, folder)
        _wait_for_nodes(cluster, seconds=20)
        yield cluster


def _start_munge(host: Host, folder: Path) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(128))
    files = {
        "key-file": key,
        "socket": "munge.sock",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "seed",
    }
    host.check("munged", *(f"--{option}={folder / name}" for option, name in files.items()))


def _wait_for_nodes(cluster: Cluster, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (idle := cluster.head.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip()) != str(len(cluster.hosts)):
        assert time.monotonic() < deadline, f"idle nodes: {idle!r}; {cluster.head.run('sinfo', '-N', '-l').stdout}"
        time.sleep(0.1)
