"""What goes wrong on clusters: every fault ends on all hosts, in time, with a sentence."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from cluster.lab import Host

STEPS_JOB = "tests/jobs/steps_job.py"
MANY = 10_000  # steps: more than there is time for
TRAINING = [f"rank {rank} of 4 trains on node{1 + rank // 2}" for rank in range(4)]

pytestmark = pytest.mark.timeout(180)


def test_an_interface_that_is_not_there(hosts, launch, launcher: str) -> None:
    job = launch(launcher, hosts(2), STEPS_JOB, 20, MANY, options=["--interface", "eth7"])
    assert set(job.end()) == {1}
    for host in job.hosts[: len(job.jobs)]:
        assert f"{host.name} has no interface 'eth7' with an IPv4 address: it has eth0 ({host.address})" in job.stdout


def test_an_interface_that_leads_elsewhere(hosts, launch, launcher: str) -> None:
    first, second = hosts(2)
    for host in (first, second):
        host.check("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "nowhere")
        host.check("ip", "addr", "add", f"192.168.7.{host.name[-1]}/24", "dev", "eth1")
        host.check("ip", "link", "set", "eth1", "up")
    job = launch(launcher, [first, second], STEPS_JOB, 20, MANY, options=["--interface", "eth1", "--timeout", "5"])
    assert set(job.end()) == {1}
    if launcher == "torchrun":
        assert (
            "node2 could not meet the head node at 10.77.0.1 port 29400 within 5 s, from its own address" in job.stdout
        )
        assert "1 of 2 hosts came within 5 s (node1)" in job.stdout
    else:
        assert re.search(
            r"node2 cannot connect to the host of the launcher at 192.168.7.1 port \d+ through eth1", job.stdout
        )


@pytest.mark.parametrize(
    ("launcher", "place", "said"),
    [
        ("torchrun", ["--master", "localhost"], "the head node 'localhost' stands for 127.0.0.1 on node1"),
        ("torchrun", ["--master", "127.0.0.1"], "the head node '127.0.0.1' stands for 127.0.0.1 on node1"),
        ("torchrun", ["--master", "node9"], "node1 does not know the head node 'node9'"),
        ("mpirun", ["--hosts", "localhost:2,node2:2"], "localhost stands for 127.0.0.1 on node1"),
        ("horovodrun", ["--hosts", "127.0.0.1:2,node2:2"], "127.0.0.1 stands for 127.0.0.1 on node1"),
        ("mpirun", ["--hosts", "node1:2,node9:2"], "node1 does not know the name 'node9'"),
        ("mpirun", ["--hosts", "node1:2,10.77.0.1:2"], "node1 is in --hosts node1:2,10.77.0.1:2 more than once"),
        ("mpirun", ["--hosts", "node1:2,node2"], "expected HOST:N,HOST:N,... with each host once"),
    ],
)
def test_hosts_that_cannot_be_meant(hosts, launcher: str, place: list[str], said: str) -> None:
    first, _ = hosts(2)
    more = ["--nodes", "2", "--procs-per-node", "2"] if launcher == "torchrun" else []
    began = time.monotonic()
    job = first.run("bash", f"launch/{launcher}.sh", *more, *place, "--", STEPS_JOB)
    assert job.returncode == (2 if said.startswith("expected") else 1)  # 2: of the command line alone
    assert said in job.stdout
    assert time.monotonic() - began < 10


def test_a_head_node_that_others_cannot_name(hosts) -> None:
    """A copied /etc/hosts: on node2, node1 stands for 127.0.1.1."""
    _, second = hosts(2)
    second.check("sed", "-n", "w /etc/hosts", "/dev/null")
    second.check("bash", "-c", "echo 127.0.1.1 node1 node2 > /etc/hosts")
    job = second.run(
        "bash", "launch/torchrun.sh", "--nodes", "2", "--procs-per-node", "2", "--master", "node1", "--", STEPS_JOB
    )
    assert job.returncode == 1
    assert "the head node 'node1' stands for 127.0.1.1 on node2" in job.stdout


@pytest.mark.parametrize("there", [0, 1])
def test_a_host_that_never_comes(hosts, there: int) -> None:
    """Torchrun is started on one of two hosts only."""
    host = hosts(2)[there]
    place = ("--nodes", "2", "--procs-per-node", "2", "--master", "node1", "--timeout", "4")
    began = time.monotonic()
    job = host.run("bash", "launch/torchrun.sh", *place, "--", STEPS_JOB)
    assert 3 < time.monotonic() - began < 15
    assert job.returncode == 1
    said = (
        "1 of 2 hosts came within 4 s (node1)",
        "node2 could not meet the head node at 10.77.0.1 port 29400 within 4 s",
    )
    assert said[there] in job.stdout


def test_hosts_that_disagree(hosts) -> None:
    first, second = hosts(2)
    place = ("bash", "launch/torchrun.sh", "--procs-per-node", "2", "--master", "node1", "--nodes")
    jobs = [first.start(*place, "2", "--", STEPS_JOB), second.start(*place, "3", "--", STEPS_JOB)]
    for job in jobs:
        assert job.wait(20).returncode == 1
        assert "node2 was given --nodes 3, the head node --nodes 2" in job.stdout


def test_a_host_that_is_down(hosts, launch, launcher: str) -> None:
    first, second = hosts(2)
    second.cut()
    job = launch(launcher, [first, second], STEPS_JOB, 20, MANY, options=["--timeout", "4"])
    assert set(job.end()) == {1}
    if launcher == "torchrun":
        assert "1 of 2 hosts came within 4 s (node1)" in job.stdout
    else:
        assert "node2 cannot take part: ssh: connect to host node2 port 22:" in job.stdout


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_ssh_that_is_refused(hosts, launch, launcher: str, tmp_path: Path) -> None:
    first, second = hosts(2)
    (tmp_path / "lab" / "ssh" / "user.pub").write_text("")
    job = launch(launcher, [first, second], STEPS_JOB, 20, MANY)
    assert job.end() == [1]
    assert "Permission denied" in job.stdout
    assert "'ssh node2 true' must work without a password, from node1" in job.stdout


def test_a_port_in_use(hosts, launch) -> None:
    first, second = hosts(2)
    listener = (
        "import socket, time; s = socket.create_server(('', 29400)); print('listens', flush=True); time.sleep(99)"
    )
    other = first.start("python", "-c", listener).wait_for("listens", 10)
    job = launch("torchrun", [first, second], STEPS_JOB, 20, MANY, options=["--timeout", "5"])
    statuses = [j.wait(30).returncode for j in job.jobs]
    other.process.kill()
    assert statuses == [1, 1]
    assert "port 29400 of node1 cannot be had (Address already in use)" in job.jobs[0].stdout
    assert "(the head node ended, or another program has the port)" in job.jobs[1].stdout


def test_a_rank_killed_on_the_other_host(hosts, launch, launcher: str) -> None:
    job = launch(launcher, hosts(2), STEPS_JOB, 30, MANY, seconds=100)
    job.wait_for(TRAINING)
    began = time.monotonic()
    second = job.hosts[1]
    second.check("kill", "-9", str(_ranks(second)[-1]))
    assert 0 not in job.end()
    print(f"{launcher}: all processes had ended {time.monotonic() - began:.1f} s after one rank was killed")
    assert time.monotonic() - began < 45
    print(job.stdout)


def _ranks(host: Host) -> list[int]:
    others = ("syncbn/cluster", "horovodrun", "mpirun", "prted", "bash", "sh -c", "timeout", "ssh")
    return [
        pid
        for pid, command in host.processes().items()
        if "steps_job.py" in command and not any(word in command for word in others)
    ]


def test_a_link_cut_in_mid_training(hosts, launch, launcher: str) -> None:
    """`init(timeout)` ends the ranks. The launcher's own processes must not stay behind on either side."""
    job = launch(launcher, hosts(2), STEPS_JOB, 15, MANY, seconds=100)
    job.wait_for(TRAINING)
    # Open MPI's daemon on the host that is cut off stays until the kernel gives its connection up: 15 minutes, else.
    job.hosts[1].check("sysctl", "-qw", "net.ipv4.tcp_retries2=5")
    began = time.monotonic()
    job.hosts[1].cut()
    while any(map(_ranks, job.hosts)):
        assert time.monotonic() - began < 120, [(host.name, host.processes()) for host in job.hosts] + [job.stdout]
        time.sleep(0.1)
    print(f"{launcher}: all ranks had ended {time.monotonic() - began:.1f} s after the link was cut")
    assert 0 not in job.end()
    print(f"{launcher}: all processes had ended {time.monotonic() - began:.1f} s after the link was cut")
    print(job.stdout)


def test_restart_after_a_killed_rank(hosts, launch) -> None:
    job = launch("torchrun", hosts(2), STEPS_JOB, 30, 100, options=["--max-restarts", "1"], seconds=100)
    job.wait_for(TRAINING)
    second = job.hosts[1]
    second.check("kill", "-9", str(_ranks(second)[-1]))
    assert job.end() == [0, 0], job.stdout
    assert all(f"rank {rank} is done" in job.stdout for rank in range(4))


@pytest.mark.parametrize("lost", ["the agent", "the host"])
def test_a_host_that_comes_back(hosts, launch, lost: str) -> None:
    """Torchrun's own elasticity. The ranks end with their agent."""
    job = launch("torchrun", hosts(2), STEPS_JOB, 30, 100, options=["--max-restarts", "1"], seconds=150)
    job.wait_for(TRAINING)
    second = job.hosts[1]
    assert second.kill("syncbn/cluster agent" if lost == "the agent" else "") >= 1
    began = time.monotonic()
    second.wait_until_empty(5)
    assert job.jobs[1].wait(5).returncode != 0
    job.jobs[1] = second.start(*job.jobs[1].command)
    assert job.end() == [0, 0], job.stdout
    assert all(f"rank {rank} is done" in job.stdout for rank in range(4))
    print(f"{lost} was lost: the job had ended {time.monotonic() - began:.1f} s later\n{job.stdout}")


def test_a_host_that_does_not_come_back(hosts, launch) -> None:
    options = ["--max-restarts", "1", "--timeout", "20"]
    job = launch("torchrun", hosts(2), STEPS_JOB, 30, MANY, options=options, seconds=100)
    job.wait_for(TRAINING)
    began = time.monotonic()
    job.hosts[1].kill("syncbn/cluster agent")
    assert 0 not in job.end()
    assert "a host was lost and did not come back to node1 within 20 s" in job.jobs[0].stdout
    assert time.monotonic() - began < 60


def test_a_killed_agent_ends_the_job(hosts, launch) -> None:
    job = launch("torchrun", hosts(2), STEPS_JOB, 30, MANY, seconds=100)
    job.wait_for(TRAINING)
    began = time.monotonic()
    job.hosts[0].kill("syncbn/cluster agent")  # the head node's
    assert 0 not in job.end()
    print(f"all had ended {time.monotonic() - began:.1f} s after the agent of the head node was killed\n{job.stdout}")
    assert time.monotonic() - began < 45


def test_a_stopped_rank(hosts, launch) -> None:
    job = launch("torchrun", hosts(2), STEPS_JOB, 8, MANY, seconds=100)
    job.wait_for(TRAINING)
    began = time.monotonic()
    second = job.hosts[1]
    second.check("kill", "-STOP", str(_ranks(second)[-1]))
    assert 0 not in job.end()
    print(f"all had ended {time.monotonic() - began:.1f} s after a rank was stopped\n{job.stdout}")
    assert time.monotonic() - began < 8 + 5 + 20  # init's timeout, the agent's patience with it, a busy machine


STRANGER = """
import socket, time
connections = []
for words in (b"5\\n", b"[" * 100_000, b"GET / HTTP/1.1\\r\\n\\r\\n", b"", b""):
    while True:
        try:
            connections.append(socket.create_connection(("10.77.0.1", 29400)))
            break
        except OSError:
            time.sleep(0.05)
    connections[-1].sendall(words)
print("strangers are there", flush=True)
time.sleep(99)
"""


def test_strangers_at_the_port(hosts, launch) -> None:
    """From before the hosts meet on: none of them counts, disturbs or holds up the end."""
    first, second = hosts(2)
    strangers = second.start("python", "-c", STRANGER)
    job = launch("torchrun", [first, second], STEPS_JOB, 30, 20, seconds=100)
    assert [running.wait(110).returncode for running in job.jobs] == [0, 0], job.stdout
    assert "strangers are there" in strangers.stdout
    strangers.process.kill()
