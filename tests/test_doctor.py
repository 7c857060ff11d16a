"""`syncbn doctor`: what it says of fake environments, and of real jobs, sound and ill."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch
from conftest import run_job

from syncbn._compiled import native
from syncbn._launcher import Launch
from syncbn.cli import _doctor, _installation, main
from syncbn.cli._cluster import Collective, Facts, _measured, collectives, facts, findings, merged
from syncbn.cli._installation import Part
from syncbn.cli._job import exchange, gather
from syncbn.cluster._network import choose, suspicions
from syncbn.comm import run_threads
from syncbn.errors import LaunchError

# Words between ranks


@pytest.mark.parametrize("texts", [["a"], ["", "b"], ["", ""], ["é€", "x" * 1000, "", '{"k": [1]}']])
def test_every_rank_gets_every_text(texts: list[str]) -> None:
    assert run_threads(len(texts), lambda comm: exchange(comm, texts[comm.rank])) == [texts] * len(texts)


def test_gather() -> None:
    numbers = run_threads(3, lambda comm: gather(comm, torch.tensor([comm.rank, float("nan")])).tolist())
    assert str(numbers[0]) == "[[0.0, nan], [1.0, nan], [2.0, nan]]"


# What is wrong with some ranks

RANK = Facts(
    rank=0, host="node1", device="cpu", device_id="", interface="eth0", address="10.0.0.1",
    variable="GLOO_SOCKET_IFNAME", remedy="set GLOO_SOCKET_IFNAME=eth0 on node1", cores="0xf", threads=2,
    python="3.11.7", torch="2.13.0", syncbn="0.1.0",
    compiled="avx2", kernels_setting="", shared_memory_setting="", gives_memory_back=False,
)  # fmt: skip
NODE2 = replace(RANK, rank=1, host="node2", address="10.0.0.2")
LOOPBACK = replace(RANK, interface="lo", address="127.0.0.1")
CUDA = replace(RANK, device="cuda:0", device_id="uuid-0")
COMPOSED = replace(RANK, kernels_setting="composed")
MISSING = replace(RANK, compiled="")


@pytest.mark.parametrize(
    "world",
    [
        [RANK, replace(RANK, rank=1)],
        [RANK, NODE2],
        [LOOPBACK, replace(LOOPBACK, rank=1)],  # one host
        [CUDA, replace(CUDA, rank=1, device="cuda:1", device_id="uuid-1")],
        [CUDA, replace(CUDA, rank=1, host="node2")],
        [replace(RANK, cores="0x3"), replace(RANK, rank=1, cores="0xc")],  # bound, two cores each
        [replace(RANK, variable="", interface="", address=""), NODE2],  # MPI chooses itself
        [RANK, replace(NODE2, compiled="avx512")],  # another processor: nothing to be done
        [COMPOSED, replace(COMPOSED, rank=1)],  # as asked for, everywhere
        [MISSING, replace(MISSING, rank=1)],
        [CUDA, replace(CUDA, rank=1, host="node2", compiled="", shared_memory_setting="0")],  # of no use there
        [replace(RANK, shared_memory_setting="0"), replace(RANK, rank=1, shared_memory_setting="0")],
        [replace(RANK, variable=""), replace(RANK, variable="", rank=1, shared_memory_setting="0")],  # MPI
        [replace(CUDA, gives_memory_back=True)],  # its large tensors are elsewhere
    ],
)
def test_sound_ranks(world: list[Facts]) -> None:
    assert findings(world) == []


@pytest.mark.parametrize(
    ("world", "severity", "words"),
    [
        ([RANK, replace(RANK, rank=1, torch="2.12.0")], "error", "torch: 2.13.0 on rank 0; 2.12.0 on rank 1"),
        ([RANK, replace(RANK, rank=1), replace(NODE2, rank=2, python="3.10")], "error", "3.11.7 on ranks 0, 1; 3.10"),
        ([RANK, replace(RANK, rank=1, syncbn="0.2.0")], "error", "different versions of syncbn"),
        ([CUDA, replace(CUDA, rank=1)], "error", "ranks 0, 1 share one CUDA device (cuda:0 on node1)"),
        ([CUDA, replace(RANK, rank=1)], "error", "rank 1 without a CUDA device"),
        ([LOOPBACK, NODE2], "error", "uses interface lo, which is loopback: set GLOO_SOCKET_IFNAME=eth0 on node1"),
        ([replace(RANK, threads=5)], "warning", "5 threads on 4 cores"),
        ([replace(RANK, cores="0x1"), replace(RANK, rank=1, cores="0x1")], "warning", "start fewer ranks"),
        ([replace(RANK, threads=3), replace(RANK, rank=1)], "warning", "set OMP_NUM_THREADS=2"),
        ([RANK, replace(COMPOSED, rank=1)], "warning", "rank 1: SYNCBN_KERNELS=composed has"),
        ([RANK, replace(COMPOSED, rank=1, compiled="")], "warning", "unset it there"),
        ([MISSING, replace(RANK, rank=1)], "warning", "rank 0: without the compiled kernels"),
        ([CUDA, replace(CUDA, rank=1, host="node2", kernels_setting="composed")], "warning", "rank 1: SYNCBN_KERNELS"),
        ([RANK, replace(RANK, rank=1, shared_memory_setting="0")], "warning", "rank 1: SYNCBN_SHARED_MEMORY=0"),
        ([RANK, replace(RANK, rank=1, gives_memory_back=True)], "hint", "rank 1: malloc gives the memory of"),
    ],
)
def test_what_is_wrong_is_named(world: list[Facts], severity: str, words: str) -> None:
    (finding,) = findings(world)
    assert finding.severity == severity
    assert words in finding.text


def test_many_ranks_are_not_all_named() -> None:
    world = [replace(RANK, rank=rank, torch=str(rank == 99), cores=hex(2**300 - 1)) for rank in range(100)]
    assert "False on ranks 0, 1, 2, 3, 4, 5, 6, ... (99 in all); True on rank 99" in findings(world)[0].text


def test_ranks_that_know_other_facts_are_of_another_version() -> None:
    told = [asdict(RANK), {**asdict(RANK), "rank": 1, "syncbn": "9", "more": 1}]
    with pytest.raises(LaunchError, match=r"0\.1\.0 on rank 0; 9 on rank 1"):
        _doctor._facts(told)


def test_every_reason_for_the_slow_path_is_named() -> None:
    world = [RANK, replace(COMPOSED, rank=1), replace(MISSING, rank=2), replace(COMPOSED, rank=3)]
    world = [replace(rank, threads=1) for rank in world]
    turned_off, missing = findings(world)
    assert turned_off.text.startswith("ranks 1, 3: SYNCBN_KERNELS")
    assert missing.text.startswith("rank 2: without the compiled kernels")


@pytest.mark.parametrize(
    ("rank", "kernels", "shared_memory"),
    [
        (RANK, "avx2", True), (COMPOSED, "composed", True), (MISSING, "composed", False), (CUDA, "CUDA", True),
        (replace(CUDA, kernels_setting="composed"), "composed", True),
        (replace(RANK, shared_memory_setting="0"), "avx2", False),
        (replace(RANK, kernels_setting="compiled", shared_memory_setting="1"), "avx2", True),
        (replace(CUDA, kernels_setting="triton"), "triton", True),
    ],
)  # fmt: skip
def test_what_decides_the_path(rank: Facts, kernels: str, shared_memory: bool) -> None:
    assert (rank.kernels, rank.shared_memory) == (kernels, shared_memory)


def test_the_facts_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_KERNELS", "composed")
    monkeypatch.setenv("SYNCBN_SHARED_MEMORY", "0")
    mine = facts(TORCHRUN, choose(TORCHRUN, {}, "node1", "10.0.0.1", FOUND))
    assert (mine.kernels_setting, mine.shared_memory_setting) == ("composed", "0")
    assert (mine.kernels, mine.shared_memory) == ("composed", False)
    assert bool(mine.compiled) == (native is not None)


# This host's network

FOUND = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}
TORCHRUN, MPIRUN = Launch("torchrun", 0, 2), Launch("mpirun", 0, 2)


@pytest.mark.parametrize(
    ("launch", "env", "name_address", "interface", "problem"),
    [
        (TORCHRUN, {}, "10.0.0.1", "eth0", ""),
        (TORCHRUN, {}, "127.0.1.1", "lo", ""),
        (TORCHRUN, {}, "", "", "resolves to no address"),
        (TORCHRUN, {"GLOO_SOCKET_IFNAME": "eth0"}, "", "eth0", ""),
        (TORCHRUN, {"GLOO_SOCKET_IFNAME": "eth0,lo"}, "127.0.1.1", "eth0", ""),
        (TORCHRUN, {"GLOO_SOCKET_IFNAME": "ib0"}, "10.0.0.1", "ib0", "no such interface"),
        (MPIRUN, {"GLOO_SOCKET_IFNAME": "ib0"}, "10.0.0.1", "", ""),
    ],
)
def test_the_interface_in_use(launch: Launch, env: dict[str, str], name_address: str, interface: str, problem: str):
    here = choose(launch, env, "node1", name_address, FOUND)
    assert here.interface == interface
    assert problem in here.problem
    assert bool(problem) == bool(here.problem)


@pytest.mark.parametrize(
    ("env", "name_address", "words"),
    [
        (
            {"LOCAL_WORLD_SIZE": "1"},
            "127.0.1.1",
            ["(its host name node1 is 127.0.1.1), which no other host can reach: set GLOO_SOCKET_IFNAME=eth0"],
        ),
        ({"LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}, "10.0.0.1", ["no other host can reach"]),
        ({"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.1.1"}, "10.0.0.1", ["MASTER_ADDR=127.0.1.1"]),
        ({"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "127.0.1.1"}, "127.0.1.1", ["no other host", "MASTER_ADDR"]),
        ({"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "127.0.1.1", []),  # one host: loopback is right
        ({"LOCAL_WORLD_SIZE": "1"}, "10.0.0.1", []),
    ],
)
def test_why_the_ranks_may_not_have_met(env: dict[str, str], name_address: str, words: list[str]) -> None:
    said = suspicions(TORCHRUN, env, choose(TORCHRUN, env, "node1", name_address, FOUND))
    assert len(said) == len(words)
    assert all(word in text for word, text in zip(words, said, strict=True))


# The collectives


def test_a_right_sum_is_timed() -> None:
    outcome = _measured("x", lambda x: 3 * x, 0, 2, "cpu")  # rank 0 sends 1, rank 1 would send 2
    assert (outcome.failed, outcome.note) == (False, "")
    assert outcome.seconds is not None


def test_a_wrong_sum_is_a_failure() -> None:
    outcome = _measured("x", lambda x: x, 0, 2, "cpu")
    assert outcome.failed
    assert "expected 3, ..., got 1" in outcome.note


def test_a_failure_elsewhere_reaches_rank_0() -> None:
    fine, ill = Collective("MPI", seconds=1e-6), Collective("MPI", seconds=2e-6, note="wrong sum", failed=True)
    assert merged([[fine], [ill]]) == [Collective("MPI", seconds=2e-6, note="rank 1: wrong sum", failed=True)]
    assert merged([[fine], [fine]]) == [fine]


@pytest.mark.parametrize(
    ("outcome", "row"),
    [
        (Collective("MPI", seconds=2e-6), ["MPI", "cpu", "2", "sum is right"]),
        (Collective("MPI", note="not here"), ["MPI", "-", "-", "not here"]),
        (Collective("MPI", "cuda", note="bad", failed=True), ["MPI", "cuda", "-", "FAILED: bad"]),
        (Collective("MPI", seconds=2e-6, note="bad", failed=True), ["MPI", "cpu", "2", "FAILED: bad"]),
    ],
)
def test_a_collective_as_a_person_sees_it(outcome: Collective, row: list[str]) -> None:
    assert _doctor._collective_row(outcome) == row


def test_collectives_over_threads() -> None:
    def replica(comm):
        world = [replace(RANK, rank=rank) for rank in range(3)]
        return list(collectives(comm, Launch("mpirun", comm.rank, 3), world, timedelta(seconds=10)))

    for outcomes in run_threads(3, replica):
        names = {outcome.name: outcome for outcome in outcomes}
        assert not any(outcome.failed for outcome in outcomes)
        assert names["ThreadReplica"].seconds > 0
        assert "only under horovodrun: syncbn launch horovodrun" in names["Horovod"].note


def test_two_ranks_on_one_device_do_not_try_nccl() -> None:
    world = [replace(CUDA, rank=rank) for rank in range(2)]
    outcomes = run_threads(2, lambda comm: list(collectives(comm, MPIRUN, world, timedelta(seconds=10))))
    assert [outcome.device for outcome in outcomes[0] if outcome.failed] == ["cuda"]


# The installation alone


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {"RANK", "OMPI_COMM_WORLD_RANK", "HOROVOD_RANK"} & set(os.environ), "the tests run under a launcher"


def fake_package(path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    (path / name).mkdir()
    (path / name / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(path))  # for the process that tries it
    monkeypatch.syspath_prepend(path)


def test_alone(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    said = capsys.readouterr().out
    for part in ("python", "torch", "CUDA", "NCCL", "Gloo", "compiled kernels", "shared memory", "MPI", "Horovod"):
        assert f"\n{part}  " in said


@pytest.mark.parametrize(
    ("states", "status"), [(["ok", "absent"], None), (["ok", "broken", "absent"], 1)], ids=["absent", "broken"]
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_absent_is_fit_and_broken_is_not(alone, monkeypatch, capsys, states, status, form) -> None:
    parts = [Part(f"part{i}", state, "what", "a remedy") for i, state in enumerate(states)]
    monkeypatch.setattr(_doctor, "parts", lambda: parts)
    if status is None:
        main(["doctor", *form])
    else:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *form])
        assert ended.value.code == status
    said = capsys.readouterr().out
    if form:
        assert json.loads(said)["fit"] == (status is None)
    else:
        assert "part1: a remedy" in said
        assert ("broken: part1" in said) == (status is not None)


@pytest.mark.parametrize(("package", "look"), [("mpi4py", _installation._mpi), ("horovod", _installation._horovod)])
def test_an_absent_package(monkeypatch: pytest.MonkeyPatch, package: str, look) -> None:
    real = _installation.find_spec
    monkeypatch.setattr(_installation, "find_spec", lambda name: None if name == package else real(name))
    assert look().state == "absent"
    assert look().remedy


@pytest.mark.parametrize(("package", "look"), [("mpi4py", _installation._mpi), ("horovod", _installation._horovod)])
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libmpi.so.40: cannot open')", "libmpi.so.40: cannot open"),
        ("import os; os.abort()", "exit status -6"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_broken_package(tmp_path, monkeypatch: pytest.MonkeyPatch, package: str, look, source, reason) -> None:
    monkeypatch.setattr(_installation, "PROBE_SECONDS", 1.0 if "sleep" in source else 30.0)
    fake_package(tmp_path, monkeypatch, package, source)
    part = look()
    assert (part.state, bool(part.remedy)) == ("broken", True)
    assert reason in part.what


def test_an_mpirun_of_another_mpi(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'HYDRA build details:'\n")
    mpirun.chmod(mpirun.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # the one beside it counts, on PATH or not
    mpi = Part("MPI", "ok", "Open MPI v5.0.11 by mpi4py 4.1.2, not GPU-aware")
    assert _installation._mpirun(mpi).state == "broken"
    assert "world of one" in _installation._mpirun(mpi).remedy
    assert _installation._mpirun(replace(mpi, what="MPICH Version: 5.0.2 by mpi4py 4.1.2")).state == "ok"
    assert _installation._mpirun(replace(mpi, state="absent")).state == "ok"  # nothing to compare it with


def test_shared_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("syncbn._native", reason="syncbn was installed without its compiled module")
    assert _installation._shared_memory().state == "ok"
    monkeypatch.setattr("syncbn.comm._shared_memory._open", lambda *args: (None, 13))
    assert _installation._shared_memory().state == "broken"
    assert "Permission denied" in _installation._shared_memory().what


# Under a launcher


def json_of(output: str) -> dict:
    """horovodrun puts the rank before each line."""
    (line,) = [line for line in output.splitlines() if '{"fit"' in line]
    return json.loads(line[line.index("{") :])


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_sound_job(launch) -> None:
    job = launch(2, "-m", "syncbn", "doctor", "--json")
    assert job.returncode == 0, job.stdout
    report = json_of(job.stdout)
    assert report["launcher"] == launch.launcher
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert len({json.dumps([rank["host"], rank["torch"]]) for rank in report["ranks"]}) == 1
    ran = {row["name"] for row in report["collectives"] if row["seconds"] is not None and not row["failed"]}
    assert ran >= {launch.world}
    assert ("gloo alone" in ran) == (launch.launcher == "torchrun")


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_as_a_person_sees_it(launch) -> None:
    job = launch(2, "-m", "syncbn", "doctor")
    assert job.returncode == 0, job.stdout
    assert f"2 ranks on 1 host, started by {launch.launcher}" in job.stdout
    assert job.stdout.count("rank  host") == 1
    assert "sum is right" in job.stdout
    assert job.stdout.rstrip().endswith("fit")


ILL = """
import os, signal, sys, time
import syncbn
from syncbn._launcher import detect
from syncbn.cli import _doctor, main

if detect(os.environ).rank == 1:
    {fault}
main(["doctor", "--timeout", "{seconds}"])
"""


@pytest.mark.launcher
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "seconds", "words"),
    [
        ("time.sleep(80)", 4, {"torchrun": "error on rank 0", "mpirun": "_mpi.py", "horovodrun": "still meeting"}),
        ("_doctor.collectives = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", 20, {}),
        ("_doctor.collectives = lambda *a: time.sleep(80)", 8, {"torchrun": "running the", "mpirun": "running the"}),
        ("syncbn.__version__ = '9'", 20, dict.fromkeys(("torchrun", "mpirun", "horovodrun"), "9 on rank 1")),
    ],
    ids=["never-comes", "dies", "stops", "another-version"],
)
def test_an_ill_rank(launch, tmp_path, fault: str, seconds: int, words: dict[str, str]) -> None:
    """Whatever a rank does, the job ends in time, and not with 0."""
    script = tmp_path / "ill.py"
    script.write_text(ILL.format(fault=fault, seconds=seconds))
    job = launch(2, script, seconds=50)  # the deadline, imports before it and the launcher after it
    assert job.returncode != 0
    assert words.get(launch.launcher, "") in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"GLOO_SOCKET_IFNAME": "nope0"}, "GLOO_SOCKET_IFNAME=nope0: no such interface"),
        ({"MASTER_ADDR": "127.0.0.1"}, "error on rank 1"),  # nobody listens there
    ],
)
def test_a_world_that_cannot_be_made(env: dict[str, str], words: str) -> None:
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    given = env if env == {"RANK": "0"} else {**whole, **env}
    job = run_job([sys.executable, "-m", "syncbn", "doctor", "--timeout", "5"], seconds=50, env=given)
    assert job.returncode == 1, job.stdout
    assert words in job.stdout
