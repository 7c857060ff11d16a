"""The watchdog: on what it looks at and writes, between processes, and in jobs that the launchers start."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import run_job

import syncbn
from syncbn.comm import SingleProcess, TorchDistributed, _board, _served_board, _watchdog, _whereabouts, run_threads
from syncbn.comm._board import Board, of_torch
from syncbn.comm._diagnosis import describe, judge
from syncbn.comm._place import Call, place
from syncbn.comm._served_board import served
from syncbn.comm._watchdog import Watchdog, threshold
from syncbn.comm._whereabouts import Sums, fate, identity, line
from syncbn.errors import InputError, LaunchError, MismatchError

SECOND = timedelta(seconds=1)


# ---- the threshold


@pytest.mark.parametrize(
    ("given", "env", "timeout", "seconds"),
    [
        (None, "", 600, 60),
        (None, "", 40, 20),  # the default gives way to a short timeout
        (None, "5", 600, 5),
        (None, "0", 600, 0),
        (timedelta(0), "5", 600, 0),  # what the script says comes first
        (timedelta(seconds=599), "", 600, 599),
    ],
)
def test_threshold(monkeypatch: pytest.MonkeyPatch, given, env: str, timeout: float, seconds: float) -> None:
    monkeypatch.setenv("SYNCBN_WATCHDOG", env)
    assert threshold(given, timeout * SECOND) == seconds


@pytest.mark.parametrize(
    ("given", "env", "message"),
    [
        (60 * SECOND, "", r"watchdog=.*60.*less than the timeout of 60 s.*timeout=\) a longer"),
        (-SECOND, "", "expected 0, for no watchdog"),
        (None, "61", "SYNCBN_WATCHDOG=61: expected 0, for no watchdog, or less than the timeout of 60 s"),
        (None, "nan", "SYNCBN_WATCHDOG=nan: expected 0"),
        (None, "often", "SYNCBN_WATCHDOG=often: expected a number of seconds"),
        (5, "", r"init\(watchdog=5\): expected a datetime.timedelta"),
    ],
)
def test_an_impossible_threshold_is_refused_before_anybody_waits(monkeypatch, given, env, message) -> None:
    monkeypatch.setenv("SYNCBN_WATCHDOG", env)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a rank that went on would wait for its peer
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match=message):
        syncbn.init(timeout=60 * SECOND, watchdog=given)


def test_a_process_alone_has_no_watchdog() -> None:
    syncbn.init()
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Watchdog)]


# ---- where a process is


def test_fate_of_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1)
    assert child.stdin
    assert child.stdout
    child.stdout.readline()
    where = {**identity(), "pid": child.pid}
    fates = [fate(where)]
    child.send_signal(signal.SIGSTOP)
    fates.append(within(5, lambda: fate(where), "stopped"))
    child.kill()
    fates.append(within(5, lambda: fate(where), "gone"))  # a zombie
    child.wait()
    fates.append(fate(where))
    assert fates == ["alive", "stopped", "gone", "gone"]
    assert fate({**where, "host": "another"}) == fate({**where, "space": "pid:[1]"}) == ""
    child.stdin.close()
    child.stdout.close()


def within(seconds, ask, wanted):
    """Return `wanted` once `ask()` gives that, else what it gives at the end."""
    deadline = time.monotonic() + seconds
    while ask() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return ask()


def test_the_line_is_the_programs_own() -> None:
    """A thread asks for the main thread's; that is in the standard library's code, called from here."""
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(line(of_libraries=wanted) for wanted in (True, False)))
    thread.start()
    thread.join()
    here = r"test_watchdog.py:\d+ in test_the_line_is_the_programs_own"
    assert re.fullmatch(rf"\S*/threading.py:\d+ in \w+, from tests/{here}", lines[0])
    assert re.fullmatch(rf"tests/{here}", lines[1])


class Waiting(SingleProcess):
    """A communicator whose call a test sets."""

    def ask(self, number: int, text: str = "layer 'a', forward") -> None:
        self.call, self.vector = Call(place(text), number), torch.zeros(9)


def test_only_the_same_call_at_two_looks_is_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    comm, sums = Waiting(), Sums()
    # Without what other tests have left in the middle of a call.
    monkeypatch.setattr(_whereabouts, "by_key", weakref.WeakValueDictionary({comm.key: comm}))
    seen = []
    for number in (1, 1, 1, 2, 3, 3):
        if comm.call is None or comm.call.number != number:
            comm.last = comm.call
            comm.ask(number)
        sums.look()
        seen.append(sums.ticks if sums.waiting is comm else None)
    assert seen == [None, 1, 2, None, None, 1]
    comm.ask(4)
    assert sums.tell()["row"][1] == "4"  # but others are told of the call as it is
    comm.ask(3)
    told = sums.tell()
    assert told["row"] == ["layer 'a', forward", "3", "", "9 x float32"]
    assert told["last"] == "layer 'a', forward, call 2"
    assert told["open"]
    comm.state = "broken"
    sums.look()
    assert not sums.tell()["open"]
    comm.state = "closed"
    sums.look()
    assert sums.tell()["row"] is None


# ---- what the ranks make of it


def written(beat: int, number: int | None, **more):
    where = {
        **identity(),
        "beat": beat,
        "row": None,
        "members": [0, 1],
        "open": True,
        "line": "a.py:1 in f",
        "last": "",
    }
    if number is not None:
        where["row"] = [f"layer '{number}', forward", "8", "4 channels", "9 x float64"]
    return {**where, "last": "", **more}


def test_a_mismatch_is_seen_where_all_wait() -> None:
    verdict = judge([written(2, 1), written(2, 2)], [written(1, 1), written(1, 2)])
    assert isinstance(verdict, MismatchError)
    assert "rank 1: layer '2', forward, call 8 (4 channels; 9 x float64)" in str(verdict)


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ([written(2, 1), written(2, 1)], [written(1, 1), written(1, 1)]),  # the same sum: a slow network
        ([written(2, 1), written(2, None)], [written(1, 1), written(1, None)]),  # one does not wait
        ([written(2, 1), written(1, 2)], [written(1, 1), written(1, 2)]),  # one does not run: what it wrote is old
        ([written(2, 1), written(2, 2)], [written(1, 1), written(1, 1)]),  # one has gone on since
        ([written(2, 1), written(2, 2, members=[1, 2])], [written(1, 1), written(1, 2, members=[1, 2])]),  # two groups
        ([written(2, 1), written(2, 2)], [{}, {}]),  # the first look
        ([written(2, 1), {}], [written(1, 1), {}]),  # one never wrote
    ],
)
def test_what_is_no_mismatch(now, before) -> None:
    assert judge(now, before) is None


def test_a_rank_that_has_ended_ends_the_wait() -> None:
    ended = written(2, None, ended="has come to its end")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = written(2, None, pid=child.pid)
    for lost in (ended, gone):
        assert re.search(r"rank 1 \(.*, pid \d+\) will not call any more", str(judge([written(2, 1), lost], [{}, {}])))


def test_the_table() -> None:
    told = [written(2, 1), written(2, None), written(2, 1), {}, written(2, 1, ended="has ended with OSError: disk")]
    lines = describe(told, [False] * 5, range(5))
    name = f"({socket.gethostname()}, pid {os.getpid()})"
    assert lines == [
        f"rank 1 {name} is in other code: a.py:1 in f; its last sum: none",
        "rank 3 has not started its watchdog: it did not call syncbn.init",
        f"rank 4 {name} has ended with OSError: disk",
        "ranks 0, 2: waiting in layer '1', forward, call 8 (4 channels; 9 x float64) (a.py:1 in f)",
    ]
    assert describe(told, [False] * 5, [2, 3]) == [lines[1], lines[3].replace("ranks 0, 2", "rank 2")]
    assert describe([written(2, 1, open=False)], [False], [0]) == [
        "rank 0: gave up waiting in layer '1', forward, call 8 (4 channels; 9 x float64) (a.py:1 in f)"
    ]
    silent = describe([written(2, 1), written(2, 1, host="far", last="b")], [True, True], range(2))
    assert "runs, but its Python does not" in silent[0]
    assert "rank 1 (far, " in silent[1]
    assert "does not answer: gone, stopped, or cut off" in silent[1]
    assert len(describe([written(2, None)] * 100, [False] * 100, range(100))) == 33


# ---- the board

SERVER = """
import socket, sys, time
from datetime import timedelta
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def client(port: int):
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=3 * SECOND)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_board_that_is_lost_holds_nobody_up(number: signal.Signals) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout
    port = int(server.stdout.readline())
    where = {"name": "rank 0", **identity(), "pid": server.pid}
    first, second = (Board(client(port), rank, 2, where) for rank in range(2))
    first.write({"beat": 1})
    assert within(5, second.read, [{"beat": 1}, {}]) == [{"beat": 1}, {}]
    last = second.last_table()
    assert [first.claim_table(last), second.claim_table(last)] == [True, False]
    assert second.last_table().endswith("by rank 0")
    server.send_signal(number)
    if number == signal.SIGKILL:
        server.wait()
    start = time.monotonic()
    assert second.read() == [{}, {}]
    assert second.claim_table(last)  # each for itself
    second.write({"beat": 2})
    assert second.last_table() == ""
    assert time.monotonic() - start < 8
    fate = "gone" if number == signal.SIGKILL else "stopped"
    assert second.lost == f"rank 0, which serves the watchdog's store, does not answer: it is {fate}"
    server.kill()
    server.wait()
    server.stdout.close()


def test_a_board_that_rank_0_serves() -> None:
    def rank(comm):
        board = served(comm)
        board.write({"beat": comm.rank})
        seen = within(5, lambda: len(list(filter(None, board.read()))), 3)
        comm.all_reduce(torch.zeros(1))  # rank 0's store ends with it
        board.close()
        return seen

    assert run_threads(3, rank) == [3, 3, 3]


def test_on_one_host_no_other_can_connect() -> None:
    store, told = _served_board._serve(["127.0.0.1"], 2)
    assert store is not None
    for address in _served_board._addresses():
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, told["port"]), timeout=5)


def test_a_line_to_a_store_of_another_is_closed(port: int) -> None:
    told = {"addresses": ["127.0.0.1"], "port": port, "secret": "not there"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ResourceWarning
        assert _served_board._connect(told) == (None, None)
        gc.collect()


def test_boards_in_one_store_have_names_that_all_ranks_know(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by counting: a process that was started again has not been in the worlds before."""
    monkeypatch.setattr(_board._torch.distributed_c10d, "_get_default_store", lambda: client(port))

    def rank(comm):
        boards = [of_torch(comm, "cpu") for _ in range(2)]
        boards[0].write({"beat": 1})
        boards[1].write({"beat": 2})
        seen = [within(5, board.read, [{"beat": beat}] * 2) for beat, board in enumerate(boards, 1)]
        for board in boards:
            board.close()
        return seen

    assert run_threads(2, rank) == [[[{"beat": 1}] * 2, [{"beat": 2}] * 2]] * 2


@pytest.mark.parametrize("broken", ["_connect", "_serve", "_addresses"])
def test_a_store_that_cannot_be_reached_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    cannot = {"_connect": lambda told: (None, None), "_serve": lambda addresses, size: (None, {})}
    cannot["_addresses"] = list  # on several hosts
    if broken == "_addresses":
        monkeypatch.setattr(_served_board, "hosts", lambda comm: [[0], [1]])
    monkeypatch.setattr(_served_board, broken, cannot[broken])

    def rank(comm):
        with pytest.raises(LaunchError, match=r"cannot reach the watchdog's store.*SYNCBN_WATCHDOG=0") as error:
            served(comm)
        return str(error.value)

    first, second = run_threads(2, rank)
    assert first == second
    assert ("rank 1 of 2" if broken == "_connect" else "ranks 0, 1 of 2") in first


# ---- what it may not do


class Written:
    """A board; `reads` are what it gives, one after the other, the last for ever."""

    def __init__(self, *reads) -> None:
        self.reads, self.rank, self.size, self.lost = list(reads), 0, len(reads[0]), ""

    def write(self, told) -> None: ...

    def close(self) -> None: ...

    def last_table(self) -> str:
        return ""

    def claim_table(self, last: str) -> bool:
        return True

    def read(self):
        return self.reads.pop(0) if len(self.reads) > 1 else self.reads[0]


def test_an_error_of_its_own_ends_neither_it_nor_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watchdog, "_PERIOD", 0.01)
    monkeypatch.setattr(sys, "stderr", None)  # as of a process that was started without
    comm = Waiting()
    comm.members = [0, 1]
    comm.ask(1)
    dog = Watchdog(comm, Written(["no entry", {"beat": []}]), 0.05)
    monkeypatch.setattr(_watchdog, "_running", dog)
    dog.start()
    time.sleep(0.5)
    assert dog.is_alive()
    assert _watchdog._witness(comm) == ""
    dog.end("has ended")
    dog.join(5)
    assert not dog.is_alive()


def test_it_knows_nothing_of_communicators_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of this process, say: they would be told of the processes, after seconds."""
    comm = Waiting()
    monkeypatch.setattr(_watchdog, "_running", Watchdog(comm, Written([written(1, 1)] * 2), 1.0))

    def rank(threads):
        if threads.rank == 0:
            threads.all_reduce(torch.zeros(1))
        raise OSError("of the test")

    start = time.monotonic()
    with pytest.raises(OSError, match="of the test"):
        run_threads(2, rank)
    assert time.monotonic() - start < 1
    assert "rank 1" in _watchdog._witness(comm)  # negative control


@pytest.mark.parametrize(
    ("reads", "least", "most", "says"),
    [
        ([[written(1, 1), written(1, None, ended="has ended with OSError: disk")]], 0, 0.1, "OSError: disk"),
        ([[written(1, 1)] * 2, [written(1, 1), written(1, None, ended="is over")]], 0, 0.5, r"^\n  rank 1 .* is over$"),
        ([[written(1, 1)] * 3, [written(2, 1)] * 3], 0, 0.5, "ranks 1, 2: waiting"),
        ([[written(1, 1)] * 2], 2.4, 3, "runs, but its Python does not"),
        ([[written(1, 1), {}], [written(2, 1), {}]], 0, 0.5, "has not started its watchdog"),
    ],
    ids=["known", "soon", "all go on", "silent", "never wrote"],
)
def test_an_error_waits_no_longer_than_it_takes(reads, least: float, most: float, says: str) -> None:
    comm = Waiting()
    dog = Watchdog(comm, Written(*reads), 1.0)
    start = time.monotonic()
    assert re.search(says, dog.culprits())
    assert least <= time.monotonic() - start < most


# ---- between processes


@contextlib.contextmanager
def watched(rank: int, size: int, port: int, seconds: float = 2.0):
    """Yield a communicator with a watchdog, and what that says."""
    comm = TorchDistributed()
    said = io.StringIO()
    dog = Watchdog(comm, Board(client(port), rank, size, {"name": "the test"}), seconds)
    comm.all_reduce(torch.zeros(1))
    dog.start()
    with contextlib.redirect_stderr(said):
        yield comm, said
        for thread in threading.enumerate():
            if thread.name == "syncbn table":
                thread.join(20)
        comm.all_reduce(torch.zeros(1))
    dog.end("has ended")


def elsewhere(fault: str) -> None:
    if fault == "sleep":
        time.sleep(7)
    elif fault == "keep the lock":
        ctypes.PyDLL(None).usleep(7_000_000)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def be_late(rank: int, size: int, port: int, fault: str) -> str:
    with watched(rank, size, port) as (comm, said):
        pids = comm.all_reduce(torch.eye(size, dtype=torch.float64)[rank] * os.getpid()).tolist()
        if rank == 1:
            elsewhere(fault)
        elif rank == 0 and fault == "stop":
            threading.Timer(7, os.kill, (int(pids[1]), signal.SIGCONT)).start()
        comm.all_reduce(torch.zeros(3), place("layer 'a', forward", "1 channel"))
    return said.getvalue()


@pytest.fixture
def port():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


@pytest.mark.launcher
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "state"),
    [
        ("sleep", r"is in other code: tests/test_watchdog.py:\d+ in elsewhere; its last sum: all_reduce, call \d+"),
        ("stop", r"is stopped \(SIGSTOP, a debugger\); last seen in other code: .*"),
        ("keep the lock", "runs, but its Python does not: native code holds the interpreter's lock; last seen .*"),
    ],
)
def test_one_rank_is_late(gloo, port: int, fault: str, state: str) -> None:
    said = gloo(3, be_late, port, fault, seconds=90)
    waits = r"syncbn watchdog: in layer 'a', forward, call 1: rank {} of 3 has waited 2 s\n"
    assert [len(re.findall(waits.format(rank), text)) for rank, text in enumerate(said)] == [1, 0, 1], said
    tables = re.findall(r"where every rank is\n(?:  .*\n)+", "".join(said))
    assert 1 <= len(tables) <= 2, said  # after 2 s, and perhaps after 4: once in the job
    assert re.search(rf"  rank 1 \(.*, pid \d+\) {state}\n", tables[0]), tables
    assert re.search(r"  ranks 0, 2: waiting in layer 'a', forward, call 1 \(1 channel; 3 x float32\)", tables[0]), (
        tables
    )


@pytest.mark.launcher
@pytest.mark.timeout(120)
def test_nothing_is_said_where_nobody_is_late(gloo, port: int) -> None:
    """Negative control."""
    assert gloo(3, be_late, port, "nothing", seconds=90) == [""] * 3


FORKED = """
import os, sys, time, torch, torch.distributed as dist
import syncbn
from syncbn.comm import _watchdog, run_threads
from syncbn.comm._served_board import served
boards = run_threads(2, served)
_watchdog._running = _watchdog.Watchdog(syncbn.world(), boards[0], 1.0)
_watchdog._running.start()
child = os.fork()
if not child:
    sys.exit(7 if _watchdog._running is None and _watchdog._witness(syncbn.world()) == "" else 8)
deadline = time.monotonic() + 20
while not (ended := os.waitpid(child, os.WNOHANG))[0]:
    if time.monotonic() > deadline:
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.1)
assert os.waitstatus_to_exitcode(ended[1]) == 7, ended
assert _watchdog._running.is_alive()
assert "ended" not in boards[1].read()[0]
print("both ended")
"""


@pytest.mark.timeout(100)
def test_a_forked_child_has_no_watchdog_and_ends() -> None:
    job = run_job([sys.executable, "-c", FORKED], seconds=90)
    assert job.returncode == 0, job.stdout
    assert "both ended" in job.stdout


# ---- jobs

JOB = "tests/jobs/stuck_job.py"
CULPRIT = r"PeerLostError: in layer '1', forward, call 2: .*\n.*  rank 1 \(.*, pid \d+\) "


def since_the_fault(job: subprocess.CompletedProcess[str]) -> float:
    return time.time() - float(re.findall(r"fault at ([\d.]+)", job.stdout)[0])


@pytest.mark.launcher
@pytest.mark.timeout(150)
def test_a_rank_in_other_code_is_named_and_the_job_ends(launch) -> None:
    job = launch(3, JOB, "sleep", 2, 7, seconds=140)
    seconds = since_the_fault(job)
    assert job.returncode != 0
    assert "syncbn watchdog: in layer '1', forward, call 2: rank 0 of 3 has waited 2 s" in job.stdout
    assert re.search(CULPRIT + r"is in other code: jobs/stuck_job.py:\d+ in elsewhere", job.stdout), job.stdout
    assert seconds < 55  # the rank would sleep for 60


@pytest.mark.launcher
@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("launcher", "fault", "says"),
    [
        ("torchrun", "raise", "has ended with ZeroDivisionError: division by zero"),
        ("torchrun", "exit", "has come to its end, or sys.exit"),
        ("horovodrun", "exit", "has come to its end, or sys.exit"),
    ],
)
def test_how_a_rank_ended_is_told_soon(launcher: str, fault: str, says: str) -> None:
    """Not that it has closed the world, which it does on the way out."""
    job = run_job(["bash", f"launch/{launcher}.sh", "--procs-per-node", "3", "--", JOB, fault, "60", "120"], seconds=90)
    seconds = since_the_fault(job)
    assert job.returncode != 0
    assert re.search(CULPRIT + says, job.stdout), job.stdout
    assert seconds < 20  # a busy machine's


@pytest.mark.launcher
@pytest.mark.timeout(150)
def test_a_stopped_rank_is_named_and_the_job_ends(launch) -> None:
    job = launch(3, JOB, "stop", 2, 7, seconds=140)
    assert job.returncode != 0
    assert re.search(CULPRIT + "is stopped", job.stdout), job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(150)
def test_plain_python_under_mpirun_ends_soon_after_a_rank_has_ended() -> None:
    """Not after the timeout: the watchdog sees that nobody will answer."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpirun = ["mpirun", "-n", "3", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    job = run_job([*mpirun, "python", JOB, "exit", "60", "120"], seconds=140, env=root)
    seconds = since_the_fault(job)
    assert job.returncode != 0
    assert re.search("PeerLostError: .*will not call any more", job.stdout), job.stdout
    assert re.search(CULPRIT + "has come to its end", job.stdout), job.stdout
    assert seconds < 80


MEMBERS = """
import sys
from mpi4py import MPI
from syncbn.comm._groups import resolve
import syncbn
comm = syncbn.init()
rank, size = comm.rank, comm.size
assert list(comm.members) == list(range(size))
pair = resolve(2)
assert list(pair.members) == ([2] if rank == 2 else [0, 1]), pair.members
turned = MPI.COMM_WORLD.Split(0, key=-rank)
assert list(resolve(turned).members) == list(range(size))[::-1], resolve(turned).members
sys.stdout.write(f"rank {rank} is right\\n")
"""


@pytest.mark.launcher
@pytest.mark.timeout(100)
def test_groups_under_mpi_know_their_members() -> None:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpirun = ["mpirun", "-n", "3", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    job = run_job([*mpirun, "python", "-c", MEMBERS], seconds=90, env=root)
    assert job.returncode == 0, job.stdout
    assert job.stdout.count("is right") == 3


@pytest.mark.launcher
@pytest.mark.timeout(150)
def test_horovod_ends_for_vectors_of_different_lengths() -> None:
    """Horovod itself would wait for its stall inspector: twice the timeout."""
    command = ["bash", "launch/horovodrun.sh", "--procs-per-node", "3", "--", JOB, "skip", "60", "120"]
    job = run_job(command, seconds=140)
    seconds = since_the_fault(job)
    assert job.returncode != 0
    assert "MismatchError: the ranks ask for different sums" in job.stdout
    assert re.search(r"rank 1: layer '2', forward, call 2 \(8 channels; 17 x float64\)", job.stdout), job.stdout
    assert seconds < 80


OWN_WORLD = """
import sys, time, torch, torch.distributed as dist, syncbn
from datetime import timedelta
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
comm = syncbn.init(watchdog=timedelta(seconds=2))
comm.all_reduce(torch.zeros(1))
time.sleep(8 * rank)
comm.all_reduce(torch.zeros(1))
dist.destroy_process_group()
"""


@pytest.mark.launcher
@pytest.mark.timeout(120)
def test_a_world_that_the_user_made() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        meet = str(server.getsockname()[1])
    jobs = [
        subprocess.Popen([sys.executable, "-c", OWN_WORLD, str(rank), meet], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "in all_reduce, call 2: rank 0 of 2 has waited 2 s" in said[0]
    assert re.search(r"rank 1 .* is in other code: <string>:\d+ in <module>", said[0]), said


def test_the_threshold_is_of_the_worlds_own_timeout(gloo) -> None:
    assert gloo(2, _too_patient) == ["less than the timeout of 20 s"] * 2


def _too_patient(rank: int, size: int) -> str:
    with pytest.raises(InputError) as error:
        syncbn.init(watchdog=25 * SECOND)
    return re.findall("less than the timeout of 20 s", str(error.value))[0]


def test_a_world_over_another_store_has_none(gloo) -> None:
    assert gloo(2, _watches) == [False, False]


def _watches(rank: int, size: int) -> bool:
    syncbn.init(watchdog=SECOND)
    return _watchdog._running is not None
