"""What the hosts of a torchrun job tell one another: who came, and that the job has failed.

It is in the store of torchrun's own rendezvous. The head node's agent makes that, since torchrun would listen on all
interfaces; it ends with that agent, which waits 5 s at most for the others. A lost connection is noticed within SILENCE
seconds.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ._addresses import HOST, HostError
from ._meeting import Meeting

SILENCE = 20  # seconds: a link that is back by then has cost nothing
STORE_SECONDS = timedelta(seconds=60)


class Board:
    """This host's view of it; `server` is the socket that the head node listens on."""

    def __init__(self, meeting: Meeting, server: socket.socket | None) -> None:
        """Open it.

        Raises:
            HostError: the head node, which has it, does not answer.
        """
        self.meeting = meeting
        self._server = None
        if server is not None:
            self._server = _store(meeting, is_master=True, master_listen_fd=server.detach())
        unanswered = meeting.end_unless_answered()
        try:
            self._store = _store(meeting, is_master=False, timeout=timedelta(seconds=meeting.timeout))
        except dist.DistError as error:  # it listened a moment ago
            raise HostError(meeting.unmet(str(error).splitlines()[0])) from None
        finally:
            unanswered.cancel()
        self._store.set_timeout(STORE_SECONDS)

    def come(self) -> None:
        """Put this host on it.

        Raises:
            HostError: the head node was given another number of hosts.
        """
        given = self.meeting.nodes
        if self.meeting.listen is not None:
            self._store.set("nodes", str(given))
        nodes = int(self._store.get("nodes"))  # waits for it
        number = self._store.add("hosts", 1)
        self._store.set(f"host {number}", f"{HOST} {self.meeting.address}")  # names may be equal
        if nodes != given:
            problem = f"{HOST} was given --nodes {given}, the head node --nodes {nodes}"
            if number <= nodes:  # not a job that runs already
                self.fail(problem)
            raise HostError(problem)

    def came(self) -> list[str]:
        """Return the hosts that came so far."""
        hosts = [self._store.get(f"host {n + 1}").decode() for n in range(self._store.add("hosts", 0))]
        return [host.partition(" ")[0] for host in dict.fromkeys(hosts)]  # one that was lost may have come again

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
            left, came = self._store.add("left", 1), min(self._store.add("hosts", 0), self.meeting.nodes)
            while self.meeting.listen is not None and left < came and time.monotonic() < deadline:
                time.sleep(0.05)
                left = self._store.add("left", 0)


def _store(meeting: Meeting, timeout: timedelta = STORE_SECONDS, **options: Any) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        meeting.head, meeting.port, timeout=timeout, wait_for_workers=False, multi_tenant=True, **options
    )


def impatient(address: str, port: int) -> None:
    """Have the kernel give up connections of this process to there, torchrun's too, after SILENCE seconds, not 900."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed in the meantime, or without a peer
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                there = connection.getpeername()
                if there[:2] in ((address, port), (f"::ffff:{address}", port)):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE // 3)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)
