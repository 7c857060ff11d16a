"""Run torchrun on all hosts of a job, or on none: start when all are there, end everywhere when it fails on one.

torchrun alone waits ten minutes for a host that does not come, and ends in a traceback; it lets the ranks of one host
wait for those of another whose torchrun has failed; and where it is cut off from the head node it waits for the link,
deaf to SIGTERM.

The head node listens on the port that torchrun uses next. The others connect, from the address that their ranks will
use, and say who they are. The connections stay: over them each host says how its torchrun ended.
"""

import argparse
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from network import HOST, HostError

GREETING = b"syncbn\n"  # torchrun's store, which may have the port still, never speaks first
GRACE = 10  # seconds for ranks to notice by themselves, as they know best what happened; and for torchrun to end
SILENCE = 30  # seconds after which a connection counts as lost

Message = dict[str, object]


def main() -> int:
    """Meet, then run the command to its end; return its exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option, kind in {"--head": str, "--address": str, "--port": int, "--nodes": int, "--timeout": float}.items():
        parser.add_argument(option, type=kind, required=True)
    parser.add_argument("--is-head", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    peers = listen(args) if args.is_head else [come(args)]
    return Run(args.command[1:], peers).to_the_end()  # after --


def say(text: str) -> None:
    """Tell the user."""
    print(f"torchrun.sh: {text}", file=sys.stderr, flush=True)


class Peer:
    """The connection to another host, which sends JSON, a message a line."""

    def __init__(self, connection: socket.socket, name: str = "") -> None:
        self.name = name
        self.address = connection.getpeername()[0]
        self._connection = connection
        self._received = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in {"KEEPIDLE": SILENCE // 3, "KEEPINTVL": SILENCE // 6, "KEEPCNT": 4}.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)

    def fileno(self) -> int:
        """For select."""
        return self._connection.fileno()

    def greet(self) -> None:
        """Speak first."""
        self._connection.sendall(GREETING)

    def send(self, message: Message) -> None:
        """Send; a peer that has gone is noticed when we read."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self, seconds: float) -> Message | None:
        """Return the next message, None at the end of the connection.

        Raises:
            OSError: nothing came in time, or the connection is lost.
            ValueError: it is not one of us.
        """
        self._connection.settimeout(seconds)
        while b"\n" not in self._received:
            more = self._connection.recv(4096)
            if not more:
                return None
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def close(self, *, after_it: bool = False) -> None:
        """Close; `after_it`: who closes first keeps the port busy, and that must not be the head node."""
        if after_it:
            self._connection.settimeout(1)
            with suppress(OSError):
                self._connection.recv(1)
        self._connection.close()


def listen(args: argparse.Namespace) -> list[Peer]:
    """Wait for the others, on the head node."""
    peers: dict[str, Peer] = {}  # by address: one that comes again takes its own place
    problem = None
    began = time.monotonic()
    told = False
    with _server(args.port) as server:
        while len(peers) < args.nodes - 1 and problem is None:
            passed = time.monotonic() - began
            if passed > args.timeout:
                problem = _missing(args, peers)
            if passed > 2 and not told:
                told = True
                say(f"{1 + len(peers)} of {args.nodes} hosts are there; waiting {args.timeout:g} s at most for others")
            if not select.select([server], [], [], 0.2)[0]:
                continue
            peer = Peer(server.accept()[0])
            nodes = _greet(peer)
            if nodes is None:
                peer.close()
                continue
            peers[peer.address] = peer
            if nodes != args.nodes:
                problem = f"{peer.name} was given --nodes {nodes}, the head node {HOST} --nodes {args.nodes}"
    for peer in peers.values():
        peer.send({"problem": problem})
        if problem is not None:
            peer.close(after_it=True)
    if problem is not None:
        raise HostError(problem)
    return list(peers.values())


def _server(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise HostError(
            f"port {port} of the head node {HOST} cannot be had ({error.strerror}): another job may have it, or this "
            "one was started twice here; give another --port on every host"
        ) from error


def _greet(peer: Peer) -> object:
    """Learn the peer's name, and return its number of hosts; None if it is not one of us."""
    try:
        peer.greet()
        introduction = peer.receive(5) or {}
    except (OSError, ValueError):
        return None
    peer.name = str(introduction.get("host"))
    return introduction.get("nodes")


def _missing(args: argparse.Namespace, peers: dict[str, Peer]) -> str:
    came = ", ".join([HOST, *(peer.name for peer in peers.values())])
    return (
        f"{1 + len(peers)} of {args.nodes} hosts came within {args.timeout:g} s ({came}): start the same command on "
        f"the others, and check that they can connect to {args.head} port {args.port}"
    )


def come(args: argparse.Namespace) -> Peer:
    """Go to the head node and wait for its word."""
    deadline = time.monotonic() + args.timeout
    told, error = False, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((args.head, args.port), min(left, 5), (args.address, 0))
            if connection.recv(len(GREETING)) == GREETING:
                head = Peer(connection, f"the head node {args.head}")
                head.send({"host": HOST, "nodes": args.nodes})
                verdict = head.receive(left + 5)  # the head node's own deadline, which may be later, comes first
                if verdict is not None and verdict["problem"] is None:
                    return head
                head.close()
                if verdict is not None:
                    raise HostError(str(verdict["problem"]))
            error = "another program has the port"
        except OSError as reason:
            error = reason.strerror or str(reason)
        if not told and left < args.timeout - 2:
            told = True
            say(f"no head node at {args.head} port {args.port} yet ({error}); waiting {args.timeout:g} s at most")
        time.sleep(0.2)
    raise HostError(
        f"{HOST} could not meet the head node at {args.head} port {args.port} within {args.timeout:g} s, from its own "
        f"address {args.address} ({error}): start the same command there, check firewalls, or give another --interface"
    )


class Run:
    """The command on this host, and what is known of the other hosts."""

    def __init__(self, command: list[str], peers: list[Peer]) -> None:
        self._peers = peers
        self._failed = ""  # what failed elsewhere
        self._lost = ""  # whom we cannot reach
        self._stopped = False
        self._since = time.monotonic()  # when we last had ranks, and all was well
        self._process = subprocess.Popen(command, preexec_fn=_end_with_us)  # noqa: PLW1509 there are no threads
        signal.signal(signal.SIGTERM, lambda *_: self._process.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command, too

    def to_the_end(self) -> int:
        """Wait for the command, end it if the job cannot go on, tell the others, and return the exit status."""
        while self._process.poll() is None:
            for peer in select.select(self._peers, [], [], 0.2)[0]:
                self._hear(peer)
            ranks = self._ranks()
            if ranks and not self._failed:
                self._since = time.monotonic()
            patient = time.monotonic() < self._since + GRACE
            if (self._failed and not (ranks and patient)) or (self._lost and not patient):
                self._stop()
        status = self._process.returncode
        if self._stopped or (status == 0 and self._failed):
            status = 1
        elif status < 0:
            status = 128 - status
        for peer in self._peers:
            peer.send({"host": HOST, "status": status})
            peer.close()
        return status

    def _hear(self, peer: Peer) -> None:
        """Take in how another host ended."""
        try:
            message = peer.receive(1)
        except OSError as error:
            self._lost = f"{peer.name} ({error.strerror})"
            self._drop(peer)
            return
        if message is None:
            message = {"host": peer.name, "status": "unknown"}
        if message["status"] == 0:
            self._drop(peer)
            return
        self._failed = f"{message['host']} (exit status {message['status']})"
        self._drop(peer)
        for other in self._peers:  # the head node has all others, they have it alone
            other.send(message)

    def _drop(self, peer: Peer) -> None:
        peer.close()
        self._peers.remove(peer)

    def _stop(self) -> None:
        """End the command: with SIGTERM, if it listens."""
        why = (
            f"the job failed on {self._failed}"
            if self._failed
            else f"no connection to {self._lost}, no ranks left here"
        )
        say(f"error: {why}: ending it on {HOST}")
        self._stopped = True
        self._process.terminate()
        try:
            self._process.wait(GRACE if self._ranks() else 3)
        except subprocess.TimeoutExpired:
            for process in [*self._ranks(), self._process.pid]:
                os.kill(process, signal.SIGKILL)
            self._process.wait()

    def _ranks(self) -> list[int]:
        threads = Path(f"/proc/{self._process.pid}/task").glob("*/children")
        try:
            return [int(child) for thread in threads for child in thread.read_text().split()]
        except OSError:  # a thread has ended just now
            return self._ranks()


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HostError as error:
        sys.exit(f"torchrun.sh: error: {error}")
