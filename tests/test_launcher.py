"""Which launcher started us: over recorded environments, and by starting jobs with each of them."""

from __future__ import annotations

import re
import socket
import sys

import pytest
from conftest import run_job, start_job

import syncbn
from syncbn._launcher import Launch, _default_backend, _first_host, _meeting_point, detect
from syncbn.comm import SingleProcess
from syncbn.errors import BackendError, LaunchError

# What each launcher sets, of the variables that matter. Those of torchrun, Open MPI and horovodrun are met for real
# further down; those of SLURM were recorded in the lab of tests/cluster; those of MPICH are from its documentation.
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "0", "PMIX_RANK": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
HOROVODRUN = {
    "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "0", "HOROVOD_CROSS_SIZE": "1", "HOROVOD_CONTROLLER": "gloo",
}  # fmt: skip
# Job 71: sbatch --nodes 2 --ntasks-per-node 2, Slurm 22.05. Task 3 of 4, on the second node.
SBATCH = {
    "SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0", "SLURM_CPUS_ON_NODE": "2",
    "SLURM_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node1",
}  # fmt: skip
SRUN = {
    **SBATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_GTIDS": "2,3",
    "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.1",
    "SLURM_DISTRIBUTION": "block", "SLURMD_NODENAME": "node2",
}  # fmt: skip
# In the same job: srun --ntasks 2 --ntasks-per-node 1, which starts a torchrun on each node. Task 1.
SRUN_A_NODE = {
    **SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GTIDS": "1", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_ID": "1", "SLURM_STEPID": "1", "SLURM_DISTRIBUTION": "cyclic",
}  # fmt: skip
SRUN_PMI2 = {**SRUN, "PMI_FD": "11", "PMI_JOBID": "71.2", "PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_MPI_TYPE": "pmi2"}
ONE_TASK_STEP = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("none", 0, 1, 0)),
        (TORCHRUN, ("torchrun", 1, 4, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ("torchrun", 1, 2, 0)),
        (OPEN_MPI, ("mpirun", 2, 4, 0)),
        (MPICH, ("mpirun", 1, 2, 1)),
        (HOROVODRUN, ("horovodrun", 1, 2, 1)),
        (SRUN, ("srun", 3, 4, 1)),
        (SBATCH, ("none", 0, 1, 0)),  # the batch script itself: no step, one process
        # the innermost wins
        ({**SBATCH, **OPEN_MPI}, ("mpirun", 2, 4, 0)),
        ({**SRUN, **OPEN_MPI}, ("mpirun", 2, 4, 0)),  # on the far node: Open MPI's daemon was started by srun
        ({**ONE_TASK_STEP, "SLURM_STEP_NUM_TASKS": "2", **OPEN_MPI}, ("mpirun", 2, 4, 0)),
        ({**ONE_TASK_STEP, **TORCHRUN}, ("torchrun", 1, 4, 1)),
        ({**SRUN_A_NODE, **TORCHRUN}, ("torchrun", 1, 4, 1)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", **TORCHRUN}, ("torchrun", 1, 4, 1)),
        (SRUN_PMI2, ("srun", 3, 4, 1)),
        ({**SBATCH, **HOROVODRUN}, ("horovodrun", 1, 2, 1)),
    ],
)
def test_recorded_environments(env: dict[str, str], expected: tuple[str, int, int, int]) -> None:
    launch = detect(env)
    assert (launch.launcher, launch.rank, launch.size, launch.local_rank) == expected


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set"),
        ({**TORCHRUN, "RANK": "one"}, "RANK is 'one', not a number"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({**TORCHRUN, "LOCAL_RANK": "7"}, "LOCAL_RANK=7"),
        ({**TORCHRUN, **HOROVODRUN}, "HOROVOD_RANK, HOROVOD_SIZE.*RANK, WORLD_SIZE"),
        # two jobs where one was meant: each torchrun knows of itself alone
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "SLURM_PROCID, SLURM_STEP_NUM_TASKS.*--nnodes 4"),
        ({**OPEN_MPI, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE.*--nnodes 4"),
        ({**OPEN_MPI, **HOROVODRUN}, "HOROVOD_RANK, HOROVOD_SIZE.*OMPI_COMM_WORLD_RANK"),
    ],
)
def test_contradictions_are_refused_by_name(env: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError, match=re.compile(named, re.DOTALL)):
        detect(env)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[07,09-11],x", "gpu07"),
        ("a-b,c", "a-b"),
        ("r[1-2]-ib", "r1-ib"),
    ],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert _first_host(nodelist) == first


def test_meeting_point() -> None:
    assert _meeting_point(detect(TORCHRUN), TORCHRUN) == "env://"
    assert _meeting_point(detect(SRUN), SRUN) == "tcp://node1:20071"
    named = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert _meeting_point(detect(named), named) == "tcp://10.0.0.1:1234"
    with pytest.raises(LaunchError, match="SLURM_JOB_ID is not set"):
        _meeting_point(detect(SRUN), {name: value for name, value in SRUN.items() if name != "SLURM_JOB_ID"})
    with pytest.raises(LaunchError, match="SLURM_STEP_NODELIST"):
        _meeting_point(detect(SRUN), {**SRUN, "SLURM_STEP_NODELIST": ""})
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT"):
        _meeting_point(detect(OPEN_MPI), OPEN_MPI)


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [("none", "none"), ("torchrun", "gloo"), ("srun", "gloo"), ("mpirun", "mpi"), ("horovodrun", "horovod")],
)
def test_default_backend_without_cuda(launcher: str, backend: str) -> None:
    assert _default_backend(Launch(launcher)) == backend


def test_alone_there_is_nothing_to_join() -> None:
    assert isinstance(syncbn.init(), SingleProcess)
    assert syncbn.init() is syncbn.init() is syncbn.world()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"unknown backend 'ncll'.*nccl"):
        syncbn.init("ncll")


@pytest.mark.parametrize(("package", "remedy"), [("mpi4py", "syncbn[mpi]"), ("horovod", "syncbn install-horovod")])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, package: str, remedy: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(BackendError, match=re.escape(remedy)):
        syncbn.init({"mpi4py": "mpi", "horovod": "horovod"}[package])
    assert isinstance(syncbn.world(), SingleProcess)


@pytest.mark.timeout(60)
def test_too_low_a_thread_level_of_mpi_is_refused() -> None:
    code = "import mpi4py; mpi4py.rc.thread_level = 'single'; import syncbn; syncbn.init('mpi')"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = run_job([sys.executable, "-c", code], seconds=50, env=root)
    assert job.returncode != 0
    assert "thread level 0, syncbn needs MPI_THREAD_SERIALIZED" in job.stdout


JOB = """
import sys, syncbn, torch
comm = syncbn.init(**{kwargs})
sys.stdout.write(f"{{type(comm).__name__}} {{comm.rank}} {{comm.size}} {{syncbn.init() is comm}}\\n")  # in one piece
sys.stdout.flush()
layer = syncbn.SyncBatchNorm(2)
layer(torch.randn(4, 2))
{end}
"""


def script(path, end: str = "", kwargs: str = "{}"):
    file = path / "a job.py"  # a space: the scripts must quote
    file.write_text(JOB.format(end=end, kwargs=kwargs))
    return file


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_script_that_simply_ends_exits_0(launch, tmp_path) -> None:
    # Rank 0 ends a second later than its peers, as after a last evaluation.
    job = launch(2, script(tmp_path, "import time; time.sleep(1.0 if comm.rank == 0 else 0)"))
    assert job.returncode == 0, job.stdout
    assert f"{launch.world} 0 2 True" in job.stdout
    assert f"{launch.world} 1 2 True" in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_one_rank_that_raises_ends_the_job(launch, tmp_path) -> None:
    """The other rank waits in a collective: nobody may hang."""
    end = "if comm.rank == 1: raise ArithmeticError('rank 1 is ill')\nlayer(torch.randn(4, 2))"
    job = launch(2, script(tmp_path, end))
    assert job.returncode != 0
    assert "rank 1 is ill" in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_peer_that_left_is_an_error_not_a_hang(launch, tmp_path) -> None:
    """Rank 1 ends without an error while rank 0 still calls: the deadline, or the closed connection, tells."""
    end = "if comm.rank == 1: sys.exit(0)\nlayer(torch.randn(4, 2))"
    job = launch(2, script(tmp_path, end, "dict(timeout=__import__('datetime').timedelta(seconds=5))"), seconds=80)
    assert job.returncode != 0
    assert "PeerLostError: in sync_batch_norm, forward, call " in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_plain_python_under_mpirun_takes_the_job_down(tmp_path) -> None:
    """Without `python -m mpi4py`, too."""
    end = "if comm.rank == 1: raise ArithmeticError('rank 1 is ill')\nlayer(torch.randn(4, 2))"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = run_job(["mpirun", "-n", "2", "python", str(script(tmp_path, end))], seconds=60, env=root)
    assert job.returncode != 0
    assert "rank 1 is ill" in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_tensor_that_horovod_drops_is_an_error_not_a_hang(tmp_path) -> None:
    """Seen where a tensor was enqueued while Horovod's background thread ended: nobody answers any more."""
    end = "import horovod.torch as hvd\nhvd.poll = lambda handle: False\nlayer(torch.randn(4, 2))"
    job = tmp_path / "job.py"
    job.write_text(JOB.format(end=end, kwargs="dict(timeout=__import__('datetime').timedelta(seconds=3))"))
    done = run_job(["bash", "launch/horovodrun.sh", "--procs-per-node", "2", "--", str(job)], seconds=80)
    assert done.returncode != 0
    assert "no answer from Horovod within 6 s" in done.stdout


@pytest.mark.timeout(60)
def test_a_backend_by_name_makes_a_world_of_one(tmp_path) -> None:
    """DDP needs a process group, also when the script is started alone."""
    job = run_job([sys.executable, str(script(tmp_path, kwargs="dict(backend='gloo')"))], seconds=50)
    assert job.returncode == 0, job.stdout
    assert "TorchDistributed 0 1 True" in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(100)
def test_worlds_come_and_go(launch, tmp_path) -> None:
    """Made by init, ended by `close` or the user, made again: sums and layers follow, and nothing is left behind."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if launch.launcher == "mpirun" else {}
    job = launch(3, "tests/jobs/worlds_job.py", 6, tmp_path / "meet", seconds=90, env=env)
    assert job.returncode == 0, job.stdout
    left = re.findall(r"rank \d of 3: after 2: (.*); after 6: (.*)", job.stdout)
    assert len(left) == 3, job.stdout
    assert all(first == last for first, last in left), left


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_worlds_come_and_go_with_torchruns_own_store(tmp_path) -> None:
    """Where torchrun's agents serve the store, the keys of the world before are still in it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    script = ["tests/jobs/worlds_job.py", "3", str(tmp_path / "meet")]
    job = run_job([*torchrun, "--nproc-per-node=2", *script], seconds=80, env=LO)
    assert "rank 0 of 2: after 2" in job.stdout, job.stdout


LO = {"GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.launcher
@pytest.mark.timeout(60)
def test_ddp_with_a_branch_that_one_rank_does_not_use() -> None:
    """DDP's buckets and the layers' sums meet in another order there, and so must not share a channel."""
    torchrun = ["bash", "launch/torchrun.sh", "--procs-per-node", "2", "--", "tests/jobs/unused_branch_job.py"]
    job = run_job(torchrun, seconds=50, env={"SYNCBN_SHARED_MEMORY": "0"})
    assert job.returncode == 0, job.stdout
    assert job.stdout.count("trained over gloo") == 2


QUIET = """
import sys, torch, torch.distributed as dist, syncbn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
group = dist.new_group()
layer = syncbn.SyncBatchNorm(2, process_group=group)
loss = layer(torch.randn(4, 2, requires_grad=True)).sum()  # alive at exit
if sys.argv[3] == "destroyed":
    dist.destroy_process_group()
"""


@pytest.mark.launcher
@pytest.mark.parametrize("end", ["destroyed", "alive"])
def test_a_loss_that_is_alive_at_exit_is_quiet(tmp_path, end: str) -> None:
    command = [sys.executable, "-c", QUIET]
    jobs = [start_job([*command, str(rank), str(tmp_path / "meet"), end], env=LO) for rank in range(2)]
    outputs = [job.communicate(timeout=50)[0] for job in jobs]
    assert ([job.returncode for job in jobs], outputs) == ([0, 0], ["", ""])


@pytest.mark.timeout(60)
def test_no_thread_of_gloo_outlives_the_process_group(tmp_path) -> None:
    """One that waits for the interpreter while that ends aborts the process: 2 of 60 jobs did."""
    job = tmp_path / "job.py"
    job.write_text(
        "import atexit, os, syncbn, torch\n"
        "torch.set_num_threads(1)\n"
        "def threads():\n"
        "    return len(os.listdir('/proc/self/task'))\n"  # not by name: a new thread gives itself one later
        "before = threads()\n"
        "atexit.register(lambda: print('at exit:', threads() - before))\n"  # runs after what init registers
        "comm = syncbn.init('gloo')\n"
        "layer = syncbn.SyncBatchNorm(2)\n"
        "layer(torch.randn(4, 2))\n"
        "print('running:', threads() - before > 0)\n"
    )
    done = run_job([sys.executable, str(job)], seconds=50)
    assert done.returncode == 0, done.stdout
    assert "running: True" in done.stdout
    assert "at exit: 0" in done.stdout
