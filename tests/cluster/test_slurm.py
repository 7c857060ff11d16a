"""Both SLURM batch scripts, on a SLURM of two nodes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from cluster.lab import ROOT, Host
from cluster.slurm_lab import Cluster, missing_tool, slurm
from conftest import run_job

pytestmark = pytest.mark.timeout(240)

TORCHRUN, SRUN = "launch/slurm.sbatch", "launch/slurm-srun.sbatch"
both = pytest.mark.parametrize("script", [TORCHRUN, SRUN])

DETECTOR = "examples/detect_digits.py"
QUICK = ("--dtype", "float64", "--test-canvases", "2", "--eval-every", "100", "--steps", "5")

# Rank 3, on the second node, does what is asked for while the others wait in a collective.
JOB = """
import os, sys, time, syncbn, torch
comm = syncbn.init()
sys.stdout.write(f"rank {comm.rank} of {comm.size} on {os.uname().nodename}\\n")
sys.stdout.flush()
layer = syncbn.SyncBatchNorm(2)
for step in range(600):
    layer(torch.randn(4, 2))
    time.sleep(0.1)
    if step == 3 and comm.rank == 3:
        exec(sys.argv[1])
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """For SLURM. Asked for before `hosts`, so that it is removed after them. Not pytest's, which munged refuses."""
    with tempfile.TemporaryDirectory(prefix="syncbn-slurm-") as name:
        yield Path(name)


@pytest.fixture
def cluster(folder: Path, hosts: Callable[..., list[Host]]) -> Iterator[Cluster]:
    """Two nodes under SLURM."""
    reason = missing_tool()
    if reason is not None:
        pytest.skip(f"no SLURM: {reason}")
    with ExitStack() as stack:
        yield stack.enter_context(slurm(hosts(2), folder))


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "a job.py"  # a space: the scripts must quote
    file.write_text(JOB)
    return str(file)


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The losses of one process with the whole batch of 4 and nn.BatchNorm2d."""
    folder = tmp_path_factory.mktemp("whole")
    options = ("--images-per-process", "4", "--norm", "batch", "--output", str(folder))
    alone = run_job([sys.executable, DETECTOR, *options, *QUICK], seconds=100)
    assert alone.returncode == 0, alone.stdout
    return losses(folder)


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "metrics.json").read_text())["losses"], dtype=torch.float64)


@both
def test_two_nodes_train_like_one_process(cluster, tmp_path, whole_batch, script) -> None:
    options = ("--images-per-process", "1", "--norm", "sync", "--output", str(tmp_path / "run"))
    job = cluster.submit(script, DETECTOR, *options, *QUICK).wait(120)
    assert (job.state, job.field("ExitCode")) == ("COMPLETED", "0:0"), job.stdout
    assert "4 x 1 = 4 images a step" in job.stdout
    ours = losses(tmp_path / "run")
    assert len(ours) == len(whole_batch) == 5
    assert ((ours - whole_batch).abs() / whole_batch.abs()).max() <= 1e-9
    assert cluster.wait_until_idle(5) < 5


@pytest.mark.parametrize("own_name", ["loopback", "missing"])
@both
def test_the_own_name_of_a_node_does_not_matter(folder, hosts, job, script, own_name) -> None:
    with slurm(hosts(2, own_name=own_name), folder) as cluster:
        running = cluster.submit(script, job, "os._exit(7)").wait_for("rank 3 of 4 on node2", 60).wait(20)
        assert running.state == "FAILED"


FAILURES = [
    ("raise ArithmeticError('rank 3 is ill')", "ArithmeticError: rank 3 is ill"),
    ("os.kill(os.getpid(), 9)", r"(exit code 137|exitcode *: -9)"),
    ("os._exit(7)", r"(exit code 7|exitcode *: 7)"),  # sys.exit: the peers may see it, and end, before SLURM does
]


@both
@pytest.mark.parametrize(("end", "said"), FAILURES)
def test_a_failing_rank_ends_the_job(cluster, job, script, end, said) -> None:
    running = cluster.submit(script, job, end).wait_for("rank 3 of 4 on node2", 60).wait(20)
    assert running.state == "FAILED"
    status = {TORCHRUN: (1, 1, 1), SRUN: (1, 137, 7)}[script][FAILURES.index((end, said))]
    assert running.field("ExitCode") == f"{status}:0"
    assert cluster.wait_until_idle(10) < 10
    assert re.search(said, running.stdout), running.stdout


@both
def test_scancel_leaves_no_process(cluster, job, script) -> None:
    running = cluster.submit(script, job, "pass").wait_for("rank 3 of 4 on node2", 60)
    assert any("a job.py" in command for command in cluster.processes())
    cluster.head.check("scancel", running.number)
    assert running.wait(20).state == "CANCELLED"
    assert cluster.wait_until_idle(15) < 15


@both
def test_more_nodes_than_there_are(cluster, script) -> None:
    """SLURM itself says why the job waits."""
    submitted = cluster.submit("--nodes", "3", script, DETECTOR)
    time.sleep(2)  # a round of the scheduler
    assert submitted.state == "PENDING"
    assert submitted.field("Reason").startswith("Partition")
    cluster.head.check("scancel", submitted.number)


def test_a_node_that_is_lost_before_the_start(cluster, job) -> None:
    assert cluster.hosts[1].kill("slurmd") == 1
    lost = cluster.submit(SRUN, job, "pass").wait(60)
    assert lost.state == "FAILED"
    assert "failed on node node2" in lost.stdout
    assert "rank 0" not in lost.stdout


@pytest.mark.parametrize(
    ("tasks", "came"),
    [(None, "SLURM_TASKS_PER_NODE=2,1 and SLURM_NTASKS=3"), (2, "SLURM_TASKS_PER_NODE=2(x2) and SLURM_NTASKS=3")],
)
def test_torchrun_wants_as_many_ranks_on_each_node(cluster, job, tasks, came) -> None:
    unequal = cluster.submit("--ntasks", "3", TORCHRUN, "--dry-run", job, tasks=tasks).wait(20)
    assert unequal.state == "FAILED"
    assert f"got {came}" in unequal.stdout
    assert "give sbatch --ntasks-per-node P" in unequal.stdout


def test_srun_does_not(cluster, job) -> None:
    unequal = cluster.submit("--ntasks", "3", SRUN, job, "pass", tasks=None).wait_for("rank 2 of 3 on node2", 60)
    cluster.head.check("scancel", unequal.number)


@both
def test_dry_run_prints_the_command(cluster, job, script) -> None:
    option = ("--timeout", "20") if script == TORCHRUN else ("--interface=eth0",)
    dry = cluster.submit("--cpus-per-task", "1", script, "--dry-run", *option, job, "an argument").wait(20)
    assert dry.state == "COMPLETED"
    command = shlex.split(dry.stdout)
    assert command[:3] == ["env", "srun", "--kill-on-bad-exit=1"]
    assert command[-2:] == [job, "an argument"]
    if script == TORCHRUN:
        assert "syncbn/cluster torchrun --nodes=2 --procs-per-node=2 --master=node1 --timeout=20" in dry.stdout
        assert "--cpus-per-task=2" in command
    else:
        assert "syncbn/cluster slurm-rank --interface=eth0 --" in dry.stdout
        assert "--cpus-per-task=1" in command


@both
def test_the_preflight_comes_first(cluster, job, script) -> None:
    well = cluster.submit(script, "--preflight", job, "pass").wait_for("rank 3 of 4 on node2", 90)
    before, _, _ = well.stdout.partition("rank 3 of 4")
    assert "node1" in before
    assert "gloo" in before.lower()


@both
def test_a_preflight_that_fails_keeps_the_script_from_starting(cluster, job, script) -> None:
    ill = cluster.submit(script, "--preflight", "--interface", "ib0", job, "pass").wait(60)
    assert ill.state == "FAILED"
    assert f"the preflight failed (exit status 1), see above: {job} pass was not started" in ill.stdout
    assert "has no interface 'ib0'" in ill.stdout


@both
def test_a_port_in_use(cluster, job, script) -> None:
    cluster.head.start("python3", "-c", "import socket, time; s = socket.create_server(('', 20001)); time.sleep(60)")
    refused = cluster.submit(script, job, "pass").wait(60)
    assert refused.state == "FAILED"
    assert "port 20001 of node1 cannot be had" in refused.stdout
    assert "another job may have it" in refused.stdout
    assert "rank 0" not in refused.stdout


@both
def test_a_port_of_ones_own(cluster, job, script) -> None:
    cluster.submit(script, "--port", "29400", job, "pass").wait_for("rank 3 of 4 on node2", 60)
    assert cluster.head.run("ss", "--listening", "--numeric", "--tcp", "sport", "=", "29400").stdout.count("29400") > 0


@both
def test_without_scontrol(cluster, tmp_path, job, script) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for file in Path("/usr/bin").iterdir():
        if file.name != "scontrol":
            (programs / file.name).symlink_to(file)
    submit = cluster.head.run(
        "sbatch", "--wait", "--nodes", "2", "--output", f"{tmp_path}/out", script, job, env={"PATH": str(programs)}
    )
    assert submit.returncode == 1, submit.stdout
    assert "error: no scontrol on node1: install SLURM's client commands" in (tmp_path / "out").read_text()


def test_a_signal_reaches_the_script_alone(cluster, tmp_path) -> None:
    """As `sbatch --signal` sends it before the time is up. The scripts around it must not die of it."""
    (tmp_path / "job.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(print('time to save', flush=True)))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    job = cluster.submit(SRUN, f"{tmp_path}/job.py", tasks=1).wait_for("ready\nready", 30)
    cluster.head.check("scancel", "--signal", "USR1", job.number)
    assert job.wait(20).state == "COMPLETED", job.stdout
    assert job.stdout.count("time to save") == 2


def test_last_words_are_not_lost(cluster, tmp_path) -> None:
    """Plain srun loses them: 7 of 20, Slurm 22.05."""
    (tmp_path / "job.py").write_text(
        "import os, sys, time\n"
        "time.sleep(0.3)\n"
        "if os.environ['SLURM_PROCID'] == '1':\n    print('last words')\n    sys.exit(7)\n"
        "time.sleep(20)\n"
    )
    task = ("launch/slurm-rank.sh", f"{tmp_path}/job.py")
    for _ in range(10):
        failed = cluster.head.run("srun", "--kill-on-bad-exit=1", "--nodes", "2", *task)
        assert failed.returncode == 7
        assert "last words" in failed.stdout


@both
def test_a_wrong_interface(cluster, job, script) -> None:
    refused = cluster.submit(script, "--interface", "ib0", job, "pass").wait(60)
    assert refused.state == "FAILED"
    assert "has no interface 'ib0' with an IPv4 address: it has eth0 (10.77.0." in refused.stdout
    assert "rank 0" not in refused.stdout


@both
def test_a_firewall(cluster, job, script) -> None:
    """Node 2 gets no packet to the port that the ranks meet at; SLURM itself is not disturbed."""
    cluster.hosts[1].check("ip", "rule", "add", "ipproto", "tcp", "dport", "20001", "unreachable")
    option = ["--timeout", "5"] if script == TORCHRUN else []
    refused = cluster.submit(script, *option, job, "pass").wait(60)
    assert refused.state == "FAILED"
    assert "10.77.0.1 port 20001" in refused.stdout
    assert "rank 0" not in refused.stdout


@pytest.mark.parametrize("given", [(), ("SLURM_JOB_ID",), ("SLURM_JOB_ID", "SLURM_JOB_NODELIST")])
@both
def test_outside_an_allocation(script, given) -> None:
    outside = run_job(["bash", script, DETECTOR], seconds=10, env=dict.fromkeys(given, "1"))
    assert outside.returncode == 1
    missing = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE")[len(given)]
    assert f"{missing} is not set" in outside.stdout
    assert "sbatch --nodes 2" in outside.stdout


def test_a_rank_outside_a_step() -> None:
    outside = run_job(
        ["bash", "launch/slurm-rank.sh", DETECTOR],
        seconds=10,
        env={"SLURM_STEP_NODELIST": "node1", "SLURM_PROCID": "0"},
    )
    assert outside.returncode == 1
    assert "SLURM_LOCALID is not set: this is no step of a SLURM job; start it with srun" in outside.stdout


@pytest.mark.parametrize("option", ["", "--torchrun "])
def test_without_a_batch_script(cluster, tmp_path, option) -> None:
    """As after a pip install: sbatch --wrap and the command."""
    (tmp_path / "job.py").write_text("import syncbn; comm = syncbn.init(); print(f'rank {comm.rank} of {comm.size}')")
    command = f"{sys.executable} -m syncbn launch slurm {option}-- {tmp_path}/job.py"
    wrapped = cluster.submit("--wrap", command).wait(60)
    assert wrapped.state == "COMPLETED", wrapped.stdout
    assert sorted(re.findall("rank . of .", wrapped.stdout)) == [f"rank {rank} of 4" for rank in range(4)]


def test_the_batch_script_is_not_copied_alone(cluster, tmp_path, job) -> None:
    copy = tmp_path / "slurm.sbatch"
    shutil.copy(ROOT / TORCHRUN, copy)
    lost = cluster.submit(str(copy), job).wait(20)
    assert lost.state == "FAILED"
    assert f"no common.sh beside '{copy}': submit slurm.sbatch where it is" in lost.stdout


MPI_JOB = """
import os, syncbn, torch
comm = syncbn.init("mpi")
total = comm.all_reduce(torch.ones(1, dtype=torch.float64)).item()
print(f"MPI: {total:g} ranks, one on {os.uname().nodename}", flush=True)
"""


def test_plain_srun_with_open_mpi_is_refused(cluster, tmp_path) -> None:
    """It makes a world of each task. The control: MPI itself has no objection."""
    (tmp_path / "job.py").write_text(MPI_JOB)
    silent = "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
    srun = ("srun", "--nodes", "2", "--ntasks", "2", "--kill-on-bad-exit=1", sys.executable)
    assert cluster.head.run(*srun, "-c", silent).stdout.split() == ["1", "1"]
    refused = cluster.head.run(*srun, str(tmp_path / "job.py"))
    assert refused.returncode != 0
    assert "srun started 2 processes" in refused.stdout
    assert "but the mpi world has 1: start it with `syncbn launch mpirun`" in refused.stdout
    assert "ranks, one on" not in refused.stdout


def test_mpirun_in_an_allocation(cluster, tmp_path) -> None:
    (tmp_path / "job.py").write_text(MPI_JOB)
    mpirun = f"exec launch/mpirun.sh --hosts node1:2,node2:2 -- {tmp_path}/job.py"
    (tmp_path / "job.sbatch").write_text(f"#!/bin/bash\n{mpirun}\n")
    job = cluster.submit(str(tmp_path / "job.sbatch")).wait(60)
    assert job.state == "COMPLETED", job.stdout
    for node in ("node1", "node2"):
        assert job.stdout.count(f"MPI: 4 ranks, one on {node}") == 2
