"""The lab itself: what the other tests here build on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from cluster.lab import lab


def test_hosts_have_a_name_an_address_and_ssh(hosts) -> None:
    first, second = hosts(2)
    assert first.run("hostname").stdout == "node1\n"
    assert second.run("ssh", "node1", "hostname").stdout == "node1\n"
    assert first.run("ssh", "10.77.0.2", "hostname").stdout == "node2\n"
    first.wait_until_empty(5)
    second.wait_until_empty(5)


@pytest.mark.parametrize(
    ("own_name", "address"), [("address", "10.77.0.1"), ("loopback", "127.0.1.1"), ("missing", "")]
)
def test_own_names(hosts, own_name: str, address: str) -> None:
    first, second = hosts(2, own_name=own_name)
    look_up = ("getent", "ahostsv4", "node1")
    assert first.run(*look_up).stdout.partition(" ")[0] == address
    assert second.run(*look_up).stdout.partition(" ")[0] == "10.77.0.1"


def test_a_cut_link_loses_packets_until_it_is_healed(hosts) -> None:
    first, second = hosts(2)
    talk = ("timeout", "2", "bash", "-c", f"exec 3<>/dev/tcp/{first.address}/22 && read -u 3")
    assert second.run(*talk).returncode == 0
    second.cut()
    assert second.run(*talk).returncode == 124
    second.heal()
    assert second.run(*talk).returncode == 0


def test_nothing_outlives_the_lab(tmp_path: Path) -> None:
    marker = f"3{os.getpid()}"  # seconds to sleep, as a mark
    with lab(1, tmp_path) as (host,):
        host.start("bash", "-c", f"setsid sleep {marker} & setsid nohup sleep {marker} & sleep {marker}")
        while len(host.processes()) < 4:  # bash and three sleeps
            time.sleep(0.02)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(p)]
    assert not left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended in the meantime
        return b""
