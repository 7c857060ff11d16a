"""Ask the hosts of an mpirun or horovodrun job, over ssh, whether they can take part.

    ask_hosts.py NODE:RANKS,... TIMEOUT [INTERFACE]

Prints, for the launch scripts: ranks in all; threads for each; whether ranks exceed cores anywhere (1 or 0); the
interfaces and the networks by which the hosts reach one another; NODE:RANKS,... with this host as localhost, since its
own name may stand for nothing here. Standard library only.
"""

import json
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import network
from network import HOST, HostError


def main(hosts: str, timeout: str, wanted: str = "") -> None:
    """Ask all hosts at once, and print what follows."""
    ranks = parse(hosts)
    with socket.create_server(("", 0), backlog=len(ranks)) as server:  # never accepts: the kernel answers
        port = server.getsockname()[1]
        with ThreadPoolExecutor(len(ranks)) as pool:
            answers = list(pool.map(lambda host: ask(host, port, float(timeout), wanted), ranks))
    names = [str(answer["host"]) for answer in answers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise HostError(f"{twice} is in --hosts {hosts} more than once")
    cores = [int(answer["cores"]) for answer in answers]
    threads = min(max(1, have // need) for have, need in zip(cores, ranks.values(), strict=True))
    crowded = any(need > have for have, need in zip(cores, ranks.values(), strict=True))
    lists = (",".join(dict.fromkeys(str(answer[key]) for answer in answers)) for key in ("interface", "network"))
    seen = ("localhost" if answer["host"] == HOST else host for host, answer in zip(ranks, answers, strict=True))
    from_here = ",".join(f"{host}:{count}" for host, count in zip(seen, ranks.values(), strict=True))
    print(sum(ranks.values()), threads, int(crowded), *lists, from_here)


def parse(hosts: str) -> dict[str, int]:
    """Return the number of ranks of each host."""
    ranks: dict[str, int] = {}
    for part in hosts.split(","):
        host, _, count = part.partition(":")
        if not host or host.startswith("-") or not count.isdecimal() or int(count) < 1 or host in ranks:
            raise HostError(f"expected --hosts NODE:RANKS,... with each node once, got {hosts!r}")
        ranks[host] = int(count)
    return ranks


def ask(host: str, port: int, timeout: float, wanted: str) -> dict[str, Any]:
    """Return what `host` says of itself."""
    addresses = network.resolve(host)
    usable = [address for address in addresses if not network.is_loopback(address)]
    if any(map(network.is_own, usable)) or (not usable and network.is_own_name(host)):
        return network.describe(network.outwards(wanted) if not usable else network.towards(usable[0], wanted))
    if addresses and not usable:
        raise HostError(
            f"{host} stands for {addresses[0]} on {HOST}: give a name or address that means the same everywhere"
        )
    if not addresses:
        raise HostError(f"{HOST} does not know the name {host!r}: give the host's address, or add it to /etc/hosts")
    mine = network.towards(usable[0], wanted)
    question = shlex.join([sys.executable, "-", "answer", mine.address, str(port), *filter(None, [wanted])])
    command = f"cd {shlex.quote(str(Path.cwd()))} && exec {question}"
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, min(10, int(timeout)))}", host, command]
    source = Path(network.__file__).read_text()
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
    return json.loads(done.stdout)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except HostError as problem:
        sys.exit(str(problem))
