"""The hosts of an mpirun or horovodrun job, asked over ssh whether they can take part. Standard library only."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _addresses
from ._addresses import HOST, HostError


@dataclass(frozen=True)
class Hosts:
    """What a launcher has to know of them.

    Attributes:
        ranks: number of ranks by host, by the names that the user gave.
        threads: for each rank, so that none has more than its share of the cores of any host.
        crowded: whether ranks outnumber cores anywhere.
        interfaces: those by which the hosts reach one another.
        networks: likewise, "10.77.0.0/24".
        here: the name of this host among `ranks`; "" if it is none of them.
    """

    ranks: Mapping[str, int]
    threads: int
    crowded: bool
    interfaces: tuple[str, ...]
    networks: tuple[str, ...]
    here: str


def ask_all(ranks: Mapping[str, int], timeout: float, interface: str = "") -> Hosts:
    """Ask all hosts at once.

    Raises:
        HostError: a host cannot take part.
    """
    with ThreadPoolExecutor(len(ranks)) as pool:
        answers = dict(zip(ranks, pool.map(lambda host: ask(host, timeout, interface), ranks), strict=True))
    names = [str(answer["host"]) for answer in answers.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise HostError(f"{twice} is in --hosts {listed(ranks)} more than once")
    cores = {host: int(answer["cores"]) for host, answer in answers.items()}
    return Hosts(
        ranks,
        threads=min(max(1, cores[host] // ranks[host]) for host in ranks),
        crowded=any(ranks[host] > cores[host] for host in ranks),
        interfaces=tuple(dict.fromkeys(str(answer["interface"]) for answer in answers.values())),
        networks=tuple(dict.fromkeys(str(answer["network"]) for answer in answers.values())),
        here=next((host for host, answer in answers.items() if answer["host"] == HOST), ""),
    )


def listed(ranks: Mapping[str, int]) -> str:
    """Write as launchers read it.

    Example:
        >>> listed({"node1": 2, "node2": 4})
        'node1:2,node2:4'
    """
    return ",".join(f"{host}:{count}" for host, count in ranks.items())


def ask(host: str, timeout: float, wanted: str = "") -> dict[str, Any]:
    """Return what `host` says of itself."""
    addresses = _addresses.resolve(host)
    usable = [address for address in addresses if not _addresses.is_loopback(address)]
    if any(map(_addresses.is_own, usable)) or (not usable and _addresses.is_own_name(host)):
        return _addresses.describe(_addresses.towards(usable[0], wanted) if usable else _addresses.outwards(wanted))
    if addresses and not usable:
        raise HostError(
            f"{host} stands for {addresses[0]} on {HOST}: give a name or address that means the same everywhere"
        )
    if not addresses:
        raise HostError(f"{HOST} does not know the name {host!r}: give the host's address, or add it to /etc/hosts")
    mine = _addresses.towards(usable[0], wanted)
    with _addresses.listener(mine.address, 0) as server:  # never accepts: the kernel answers
        question = [sys.executable, "-", mine.address, str(server.getsockname()[1]), *filter(None, [wanted])]
        return _over_ssh(host, question, timeout)


def _over_ssh(host: str, question: list[str], timeout: float) -> dict[str, Any]:
    command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(question)}"
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, min(10, int(timeout)))}", host, command]
    source = Path(_addresses.__file__).read_text()
    try:
        done = subprocess.run(ssh, input=source, text=True, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise HostError(f"no answer from {host} over ssh within {timeout:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        remedy = ""
        if done.returncode == 255:  # ssh's own
            remedy = f": 'ssh {host} true' must work without a password, from {HOST}"
        raise HostError(f"{host} cannot take part: {said[-1]}{remedy}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
