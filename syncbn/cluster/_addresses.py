"""This host's names, addresses and interfaces. IPv4 only.

Standard library only, and nothing of the package: `_hosts` sends this file to the Python of other hosts, where nothing
need be installed, and has it run there as `python - ADDRESS PORT [INTERFACE]`, which is `answer`.
"""

import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
from typing import NamedTuple

HOST = socket.gethostname()
SOMEWHERE = "192.0.2.1"  # an address that is nobody's (RFC 5737): the route to it is the default route
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B


class HostError(Exception):
    """A sentence for the user."""


class Interface(NamedTuple):
    """A network interface with an IPv4 address."""

    name: str
    address: str
    network: ipaddress.IPv4Network


def interfaces() -> list[Interface]:
    """Return the interfaces with an address, loopback included."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                address, mask = (
                    socket.inet_ntoa(fcntl.ioctl(probe, what, request)[20:24]) for what in (SIOCGIFADDR, SIOCGIFNETMASK)
                )
            except OSError:  # it has none
                continue
            found.append(Interface(name, address, ipaddress.IPv4Network(f"{address}/{mask}", strict=False)))
    return found


def outer_interfaces() -> list[Interface]:
    """Return those by which other hosts may reach this one."""
    return [interface for interface in interfaces() if not is_loopback(interface.address)]


def is_loopback(address: str) -> bool:
    """Tell whether `address` is every host's own."""
    return ipaddress.IPv4Address(address).is_loopback


def resolve(name: str) -> list[str]:
    """Return the addresses that `name` stands for on this host; none if it is unknown."""
    try:
        return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)))
    except socket.gaierror:
        return []


def is_own(address: str) -> bool:
    """Tell whether `address` is one of this host's."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_own_name(name: str) -> bool:
    """Tell whether `name` is this host's, with or without a domain."""
    return name.partition(".")[0].lower() == HOST.partition(".")[0].lower()


def towards(address: str, wanted: str = "") -> Interface:
    """Return the interface that the route to `address` goes through, or the one called `wanted`."""
    there = outer_interfaces()
    if wanted:
        for interface in there:
            if interface.name == wanted:
                return interface
        raise HostError(f"{HOST} has no interface {wanted!r} with an IPv4 address: it has {_listed(there)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError as error:
            raise HostError(f"{HOST} has no route to {address} ({error.strerror}): it has {_listed(there)}") from error
        source = probe.getsockname()[0]
    for interface in sorted(
        there, key=lambda it: it.address != source
    ):  # the address itself, or a second one beside it
        if interface.address == source or ipaddress.IPv4Address(source) in interface.network:
            return interface._replace(address=source)
    raise HostError(f"the route from {HOST} to {address} starts at {source}, which is none of {_listed(there)}")


def _listed(there: list[Interface]) -> str:
    return ", ".join(f"{interface.name} ({interface.address})" for interface in there) or "none but loopback"


def outwards(wanted: str = "") -> Interface:
    """Return the interface by which others reach this host: that of the default route, or the only one."""
    there = outer_interfaces()
    if wanted or len(there) != 1:
        try:
            return towards(SOMEWHERE, wanted)
        except HostError as error:
            if wanted:
                raise
            raise HostError(
                f"cannot tell by which address others reach {HOST}: its name stands for none of them, and there is no "
                f"default route. Give --interface, or --master an address: it has {_listed(there)}"
            ) from error
    return there[0]


class Head(NamedTuple):
    """The head node of a job.

    Attributes:
        address: of it, as this host knows it.
        mine: the interface of this host that leads there.
        listen: the address to listen at, if this host is it, else None; "" is all, where it does not know by which
            of its addresses the others know it.
    """

    address: str
    mine: Interface
    listen: str | None = None


def head(master: str, wanted: str = "") -> Head:
    """Find the head node.

    A host's own name may stand for 127.0.1.1, as in Debian, or for nothing.
    """
    addresses = resolve(master)
    usable = [address for address in addresses if not is_loopback(address)]
    own = [address for address in usable if is_own(address)]
    if own:
        return Head(own[0], towards(own[0], wanted), listen=own[0] if len(own) == 1 else "")
    if usable:
        return Head(usable[0], towards(usable[0], wanted))
    if is_own_name(master):
        mine = outwards(wanted)
        return Head(mine.address, mine, listen="")
    if addresses:
        raise HostError(
            f"the head node {master!r} stands for {addresses[0]} on {HOST}, which is {HOST} itself: give the name or "
            f"address under which all hosts know the head node (/etc/hosts says what names stand for here)"
        )
    raise HostError(f"{HOST} does not know the head node {master!r}: give its address, or add it to /etc/hosts")


def describe(interface: Interface) -> dict[str, object]:
    """Return what a launcher has to know of this host."""
    return {
        "host": HOST,
        "interface": interface.name,
        "network": str(interface.network),
        "cores": len(os.sched_getaffinity(0)),
    }


def connect(there: str, address: str, port: int, mine: Interface, *, refusal_counts: bool) -> None:
    """Raise a problem unless a connection from `mine` to `address`, of which `there` is the name, is made.

    Or refused, where no refusal counts: packets get there, then, be it that nobody listens yet.
    """
    try:
        socket.create_connection((address, port), 10, (mine.address, 0)).close()
    except OSError as error:
        if refusal_counts or not isinstance(error, ConnectionRefusedError):
            raise HostError(
                f"{HOST} cannot connect to {there} at {address} port {port} through {mine.name} ({mine.address}): "
                f"{error}; check firewalls, or give another --interface"
            ) from error


def answer(address: str, port: str, wanted: str = "") -> dict[str, object]:
    """Connect to the launcher at `address` and describe this host."""
    mine = towards(address, wanted)
    connect("the host of the launcher", address, int(port), mine, refusal_counts=True)
    return describe(mine)


def listener(address: str, port: int) -> socket.socket:
    """Return a socket that listens there, or raise a problem: another program has the port."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise HostError(
            f"port {port} of {HOST} cannot be had ({os.strerror(error.errno or 0)}): another job may have it, or this "
            "one was started twice here; give another --port, the same on every host"
        ) from error


if __name__ == "__main__":
    try:
        print(json.dumps(answer(*sys.argv[1:])))
    except HostError as problem:
        sys.exit(str(problem))
