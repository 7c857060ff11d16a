"""Hosts on one machine: each a set of Linux namespaces with a hostname, an address, an /etc/hosts and an sshd.

They share the machine's disk and cores. A host lives as long as one process of ours, its init: when that is killed, or
pytest dies in any way, the kernel kills whatever runs on the host and removes its network. Nothing is left to clean up,
nothing in the machine's own network changes, and no name is taken, so that several labs can run at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a host's own name stands for in its /etc/hosts: its address; 127.0.1.1, as in Debian; or it is not there.
OWN_NAMES = ("address", "loopback", "missing")


def missing_tool() -> str | None:
    """Return why there can be no hosts here, if so."""
    if os.geteuid() != 0:
        return "not root"
    for tool, package in {"ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server"}.items():
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"no {tool}: apt install {package}"
    return None


class Job:
    """A command on a host. Its output goes to a file: a pipe would stay open as long as any process that it started."""

    def __init__(self, command: Sequence[str], process: subprocess.Popen[bytes], output: Path) -> None:
        self.command = command
        self.process = process
        self._output = output

    @property
    def stdout(self) -> str:
        """What it wrote so far, to stdout and stderr."""
        return self._output.read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    def wait(self, seconds: float) -> Job:
        """Wait for the end; the test fails if that takes longer."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{' '.join(self.command)} did not end within {seconds} s:\n{self.stdout}", pytrace=False)
        return self

    def wait_for(self, text: str, seconds: float) -> Job:
        """Wait until it has written `text`; the test fails if it ends before or that takes longer."""
        deadline = time.monotonic() + seconds
        while text not in self.stdout:
            if self.returncode is not None or time.monotonic() > deadline:
                pytest.fail(f"{' '.join(self.command)} did not write {text!r}:\n{self.stdout}", pytrace=False)
            time.sleep(0.05)
        return self


class Host:
    """One host; see the module. `name` is its hostname, `address` that of its interface `eth0`."""

    def __init__(self, name: str, address: str, init: int, folder: Path) -> None:
        self.name = name
        self.address = address
        self._init = init  # the pid of its init, in our own numbers
        self._folder = folder
        self._jobs: list[Job] = []

    def start(self, *command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Job:
        """Start `command` on the host, with our environment and Python."""
        output = self._folder / f"{self.name}.{len(self._jobs)}.out"
        python = str(Path(sys.executable).parent)
        enter = ["nsenter", f"--target={self._init}", "--all", "env", f"--chdir={cwd}", *command]
        environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}:/usr/sbin:/sbin", **(env or {})}
        with output.open("wb") as file:
            process = subprocess.Popen(
                enter, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self._jobs.append(Job(command, process, output))
        return self._jobs[-1]

    def run(self, *command: str, seconds: float = 30, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Job:
        """Run `command` on the host to its end."""
        return self.start(*command, env=env, cwd=cwd).wait(seconds)

    def check(self, *command: str) -> Job:
        """Run `command`, which is part of the lab and must succeed."""
        job = self.run(*command)
        assert job.returncode == 0, f"{self.name}: {command} ended with {job.returncode}: {job.stdout}"
        return job

    def processes(self) -> dict[int, str]:
        """Return the command of every process on the host, by its number there, without init and the daemons."""
        found = {}
        proc = Path(f"/proc/{self._init}/root/proc")
        for entry in proc.iterdir():
            if entry.name.isdecimal() and entry.name != "1":
                try:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except OSError:  # ended in the meantime
                    continue
                if command and not command.startswith("sshd: /usr/sbin/sshd"):  # empty: a zombie
                    found[int(entry.name)] = command
        return found

    def kill(self, text: str) -> int:
        """Kill -9 the processes on the host whose command contains `text`; return how many there were."""
        chosen = [pid for pid, command in self.processes().items() if text in command]
        if chosen:
            self.check("kill", "-9", *map(str, chosen))
        return len(chosen)

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until no process is left on the host but its daemons; the test fails if that takes longer."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                pytest.fail(f"left on {self.name} after {seconds} s: {left}", pytrace=False)
            time.sleep(0.05)

    def cut(self) -> None:
        """Pull the cable: packets get lost, and nobody is told."""
        self._switch.check("ip", "link", "set", f"to-{self.name}", "down")

    def heal(self) -> None:
        """Plug the cable in again."""
        self._switch.check("ip", "link", "set", f"to-{self.name}", "up")

    _switch: Host


@contextmanager
def lab(count: int, folder: Path, *, own_name: str = "address") -> Iterator[list[Host]]:
    """Make node1 ... node<count>, 10.77.0.1 ... on one switch, which know one another by name.

    Args:
        count: number of hosts.
        folder: for their files.
        own_name: one of OWN_NAMES.
    """
    ssh = folder / "ssh"
    _make_ssh(ssh, count)
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces("switch", "", folder))
        switch.check("ip", "link", "add", "br0", "type", "bridge")
        switch.check("ip", "link", "set", "br0", "up")
        hosts = []
        for number in range(1, count + 1):
            name, address = f"node{number}", f"10.77.0.{number}"
            (folder / f"{name}.hosts").write_text(_hosts_file(number, count, own_name))
            mounts = f"mount --bind {folder}/{name}.hosts /etc/hosts && mount --bind {ssh}/config /etc/ssh/ssh_config"
            host = stack.enter_context(_namespaces(name, mounts, folder, address))
            host._switch = switch
            _plug_in(host, switch)
            host.check("/usr/sbin/sshd", "-f", f"{ssh}/sshd_config")
            hosts.append(host)
        yield hosts


@contextmanager
def _namespaces(name: str, mounts: str, folder: Path, address: str = "") -> Iterator[Host]:
    """Start the init of a host: a shell that waits for the end of its input, which comes with our own end."""
    script = f"hostname {name} && ip link set lo up && {mounts or 'true'} && echo ready && read"
    own = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
    with subprocess.Popen(
        ["unshare", *own, "--fork", "--kill-child", "bash", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n", f"no namespaces for {name}: are we root in a container?"
            (init,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            host = Host(name, address, int(init), folder)
            yield host
        finally:
            process.kill()
    for job in host._jobs:
        job.process.wait(10)  # what it had started is dead by now


def _plug_in(host: Host, switch: Host) -> None:
    port = f"to-{host.name}"
    link = f"ip link add eth0 netns {host._init} type veth peer name {port} netns {switch._init}"
    subprocess.run(link.split(), check=True)
    switch.check("ip", "link", "set", port, "master", "br0", "up")
    host.check("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
    host.check("ip", "link", "set", "eth0", "up")


def _hosts_file(own: int, count: int, own_name: str) -> str:
    assert own_name in OWN_NAMES
    lines = ["127.0.0.1 localhost"]
    for number in range(1, count + 1):
        address = f"10.77.0.{number}"
        if number == own and own_name != "address":
            if own_name == "missing":
                continue
            address = "127.0.1.1"
        lines.append(f"{address} node{number}")
    return "\n".join(lines) + "\n"


def _make_ssh(folder: Path, count: int) -> None:
    """Make keys, and the settings of sshd and of ssh: hosts let one another in without a question."""
    folder.mkdir(mode=0o700, parents=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    public = " ".join((folder / "host.pub").read_text().split()[:2])
    names = (f"node{number},10.77.0.{number} {public}" for number in range(1, count + 1))
    (folder / "known_hosts").write_text("\n".join(names) + "\n")
    (folder / "config").write_text(
        f"Host *\n  User root\n  IdentityFile {folder}/user\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\nUsePAM no\nUseDNS no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\nMaxStartups 100\n"
    )
