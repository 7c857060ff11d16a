"""The interface that the messages of this rank take, and whether the others can reach it there: for doctor."""

from __future__ import annotations

from dataclasses import dataclass

from syncbn._launch import Environment, Launch

from . import _addresses
from ._addresses import HOST, is_loopback

# Which variable names the interface; where it is unset, the host's own name decides. MPI chooses by itself.
VARIABLES = {"torchrun": "GLOO_SOCKET_IFNAME", "srun": "GLOO_SOCKET_IFNAME", "horovodrun": "HOROVOD_GLOO_IFACE"}


@dataclass(frozen=True)
class Network:
    """How this host is reached.

    Attributes:
        host: its name.
        name_address: what its own name resolves to; "" if to nothing.
        interfaces: IPv4 address by interface.
        variable: the environment variable that chooses the interface; "" where the launcher has none.
        interface: the one in use; "" where it is unknown.
        problem: what is wrong with the choice, whatever the other hosts are; "" if nothing.
    """

    host: str
    name_address: str
    interfaces: dict[str, str]
    variable: str
    interface: str
    problem: str = ""

    @property
    def address(self) -> str:
        """The address in use, "" if unknown."""
        return self.interfaces.get(self.interface, "")

    def reachable(self, address: str) -> bool:
        """Tell whether other hosts can reach this one by `address`."""
        return bool(address) and not is_loopback(address)

    def listed(self) -> str:
        """Name the interfaces with their addresses."""
        return ", ".join(f"{name} {address}" for name, address in self.interfaces.items()) or "none"

    def suggestion(self) -> str:
        """Name an interface that other hosts can reach."""
        return next((name for name, address in self.interfaces.items() if self.reachable(address)), "the interface")

    def remedy(self) -> str:
        """Say how to choose another interface."""
        if not self.variable:
            return f"give host {self.host} an address in /etc/hosts or DNS that the others can reach"
        return f"set {self.variable}={self.suggestion()} on {self.host} (it has {self.listed()})"


def network(launch: Launch, env: Environment) -> Network:
    """Look at this host."""
    found = {interface.name: interface.address for interface in _addresses.interfaces()}
    return choose(launch, env, HOST, resolve(HOST), found)


def resolve(name: str) -> str:
    """Return the first address of `name`, or ""."""
    return next(iter(_addresses.resolve(name)), "")


def choose(launch: Launch, env: Environment, host: str, name_address: str, found: dict[str, str]) -> Network:
    """Tell which interface will be used. Pure."""
    variable = VARIABLES.get(launch.launcher, "")
    given = env.get(variable, "").split(",")[0]
    by_name = next((name for name, address in found.items() if address == name_address), "")
    if not by_name and name_address.startswith("127."):
        by_name = next((name for name, address in found.items() if address.startswith("127.")), "")  # 127.0.1.1
    here = Network(host, name_address, found, variable, given or by_name if variable else "")
    if given and given not in found:
        problem = f"{variable}={given}: no such interface with an IPv4 address"
    elif variable and not given and not name_address:
        problem = f"the host name {host} resolves to no address"
    else:
        return here
    return Network(host, name_address, found, variable, given, problem)


# Where these variables say how many ranks the host has, the others are on other hosts.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "HOROVOD_LOCAL_SIZE")


def suspicions(launch: Launch, env: Environment, here: Network) -> list[str]:
    """Say what may have kept this rank from its peers. Nothing is known of them."""
    if here.problem:
        return [f"{here.problem}: {here.remedy()}"]
    several_hosts = any(env.get(name, "").isdecimal() and int(env[name]) < launch.size for name in _LOCAL_SIZES) or (
        env.get("SLURM_STEP_NUM_NODES", "1") != "1"
    )
    if not several_hosts:
        return []
    found = []
    if here.variable and here.address and not here.reachable(here.address):
        cause = "" if env.get(here.variable) else f" (its host name {here.host} is {here.name_address})"
        found.append(
            f"this rank uses {here.interface} {here.address}{cause}, which no other host can reach: {here.remedy()}"
        )
    head = env.get("MASTER_ADDR", "")
    if head and not here.reachable(resolve(head)):
        found.append(
            f"MASTER_ADDR={head} is {resolve(head) or 'unknown'} on {here.host}: it must be an address of rank 0's "
            "host that every host can reach"
        )
    return found
