"""What the hosts of a torchrun job tell one another: who came, and that the job has failed.

It is in the store of torchrun's own rendezvous. The head node's agent makes that, since torchrun would listen on all
interfaces; it ends when all hosts have left. A lost connection is noticed within SILENCE seconds.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ._addresses import HOST, HostError, listener

SILENCE = 15
STORE_SECONDS = timedelta(seconds=60)


def say(text: str) -> None:
    """Tell the user."""
    print(f"syncbn launch torchrun: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Meeting:
    """Where `nodes` hosts meet within `timeout` seconds, and this one's own `address`."""

    head: str
    port: int
    nodes: int
    timeout: float
    address: str
    listen: str | None  # the head node's; "" for all interfaces


class Board:
    """This host's view of it.

    Raises:
        HostError: the head node's port is taken, or it cannot be met in time.
    """

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        if meeting.listen is not None:
            self._server = _serve(meeting, listener(meeting.listen, meeting.port))
        else:
            _reach(meeting)
        self._store = _store(meeting)

    def come(self) -> None:
        """Put this host on it.

        Raises:
            HostError: another number of hosts was given elsewhere.
        """
        given = self.meeting.nodes
        nodes = int(self._store.compare_set("nodes", "", str(given)))
        number = self._store.add("hosts", 1)
        self._store.set(f"host {number}", HOST)
        if nodes != given:
            problem = f"{HOST} was given --nodes {given}, the head node --nodes {nodes}"
            if number <= nodes:  # not a job that runs already
                self.fail(problem)
            raise HostError(problem)

    def came(self) -> list[str]:
        """Return the hosts that came so far."""
        hosts = [self._store.get(f"host {n + 1}").decode() for n in range(self._store.add("hosts", 0))]
        return list(dict.fromkeys(hosts))  # one that was lost may have come again

    def fail(self, why: str) -> None:
        """Tell the others that the job cannot go on. The first reason stays."""
        with suppress(dist.DistError):
            self._store.compare_set("failure", "", why)

    def failure(self) -> str:
        """Return why the job cannot go on; "" while it can."""
        impatient(self.meeting.head, self.meeting.port)
        try:
            return self._store.get("failure").decode() if self._store.check(["failure"]) else ""
        except dist.DistError:
            return f"the connection to the head node at {self.meeting.head} is lost"

    def leave(self) -> None:
        """Say that this host is done. The head node, which has the store, waits for the others: 5 s at most."""
        deadline = time.monotonic() + 5
        with suppress(dist.DistError):
            left = self._store.add("left", 1)
            while self.meeting.listen is not None and left < self.meeting.nodes and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self._store.add("left", 0)


def _serve(meeting: Meeting, socket: socket.socket) -> Any:
    return _tcp_store(meeting, is_master=True, master_listen_fd=socket.detach())


def _store(meeting: Meeting) -> Any:
    return _tcp_store(meeting, is_master=False)


def _tcp_store(meeting: Meeting, **options: Any) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        meeting.head, meeting.port, timeout=STORE_SECONDS, wait_for_workers=False, multi_tenant=True, **options
    )


def _reach(meeting: Meeting) -> None:
    """Wait until there is a connection to the head node's store, from the address that the ranks will use."""
    deadline = time.monotonic() + meeting.timeout
    hint = threading.Timer(2, say, [f"no head node at {meeting.head} port {meeting.port} yet; waiting for it"])
    hint.daemon = True
    hint.start()
    while True:
        try:
            socket.create_connection((meeting.head, meeting.port), 5, (meeting.address, 0)).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostError(unmet(meeting, error.strerror or str(error))) from None
            time.sleep(0.2)
    hint.cancel()
    answered = threading.Timer(10, _end_unmet, [meeting])
    answered.daemon = True
    answered.start()
    _store(meeting)  # waits for ever for a program that is no store
    answered.cancel()


def unmet(meeting: Meeting, error: str) -> str:
    """Say that the head node is out of reach."""
    return (
        f"{HOST} could not meet the head node at {meeting.head} port {meeting.port} within {meeting.timeout:g} s, from "
        f"its own address {meeting.address} ({error}): start the same command there, check firewalls, or give another "
        "--interface"
    )


def _end_unmet(meeting: Meeting) -> None:
    say(f"error: {unmet(meeting, 'another program has the port')}")
    os._exit(1)


def impatient(address: str, port: int) -> None:
    """Have the kernel give up connections of this process to there, torchrun's too, after SILENCE seconds, not 900."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed in the meantime, or without a peer
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                there = connection.getpeername()
                if isinstance(there, tuple) and there[0].endswith(address) and there[1] == port:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)
