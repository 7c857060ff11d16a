"""Wait until torchrun.sh runs on all hosts of a job, then become torchrun. Who does not come, and why, is told to all.

torchrun alone would wait ten minutes and end in a traceback. The head node listens on the port that torchrun uses next;
the others connect from the interface they will use, say who they are, and are told to start or what is wrong.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from network import HOST, HostError

GREETING = b"syncbn\n"  # torchrun's store, which may still have the port, never speaks first
LOST_AFTER = 30  # seconds


def main() -> None:
    """Meet, then start the command."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option, kind in {"--head": str, "--address": str, "--port": int, "--nodes": int, "--timeout": float}.items():
        parser.add_argument(option, type=kind, required=True)
    parser.add_argument("--is-head", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    try:
        if args.is_head:
            listen(args)
        else:
            come(args)
    except HostError as problem:
        sys.exit(f"torchrun.sh: error: {problem}")
    if not args.is_head:
        watch(args.head, args.port)
    command = args.command[1:]  # after --
    os.execvp(command[0], command)


def say(text: str) -> None:
    """Tell the user."""
    print(f"torchrun.sh: {text}", file=sys.stderr, flush=True)


def listen(args: argparse.Namespace) -> None:
    """Wait for the others, on the head node."""
    peers: dict[str, tuple[str, socket.socket]] = {}  # by address: one that comes again takes its own place
    deadline = time.monotonic() + args.timeout
    with _server(args.port) as server:
        told = False
        while len(peers) < args.nodes - 1:
            server.settimeout(max(0.01, min(deadline - time.monotonic(), args.timeout if told else 2)))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                if time.monotonic() > deadline:
                    _end(peers, _missing(args, peers))
                if not told:
                    waiting = f"{args.nodes - 1 - len(peers)} more of {args.nodes} hosts"
                    say(f"waiting for {waiting} at {args.head} port {args.port}, at most {args.timeout:g} s")
                told = True
                continue
            peer = _introduction(connection)
            if peer is None:
                continue
            peers[peer["address"]] = (peer["host"], connection)
            if peer["nodes"] != args.nodes:
                _end(
                    peers, f"{peer['host']} was started with --nodes {peer['nodes']}, {HOST} with --nodes {args.nodes}"
                )
        _tell(peers, {"start": True})


def _server(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise HostError(
            f"port {port} of the head node {HOST} cannot be had ({error.strerror}): another job may have it, or this "
            "one was started twice here; give another --port on every host"
        ) from error


def _introduction(connection: socket.socket) -> dict[str, object] | None:
    """Greet, and return what the other side says of itself; None if it is not one of us."""
    connection.settimeout(5)
    try:
        connection.sendall(GREETING)
        return json.loads(connection.makefile().readline())
    except (OSError, ValueError):
        connection.close()
        return None


def _missing(args: argparse.Namespace, peers: dict[str, tuple[str, socket.socket]]) -> str:
    came = ", ".join([HOST, *(host for host, _ in peers.values())])
    return (
        f"{1 + len(peers)} of {args.nodes} hosts came within {args.timeout:g} s ({came}): start the same command on "
        f"the others, and check that they can connect to {args.head} port {args.port}"
    )


def _tell(peers: dict[str, tuple[str, socket.socket]], verdict: dict[str, object]) -> None:
    for _, connection in peers.values():
        try:
            connection.sendall(json.dumps(verdict).encode() + b"\n")
            connection.recv(1)  # until it closes: who closes first keeps the port busy, and that must not be us
        except OSError:
            pass  # it has gone: torchrun waits for it, with a timeout
        connection.close()


def _end(peers: dict[str, tuple[str, socket.socket]], problem: str) -> None:
    _tell(peers, {"problem": problem})
    raise HostError(problem)


def come(args: argparse.Namespace) -> None:
    """Go to the head node and wait for its word."""
    deadline = time.monotonic() + args.timeout
    told, error = False, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((args.head, args.port), min(left, 5), (args.address, 0)) as connection:
                if connection.recv(len(GREETING)) == GREETING:
                    introduction = {"host": HOST, "address": args.address, "nodes": args.nodes}
                    connection.sendall(json.dumps(introduction).encode() + b"\n")
                    connection.settimeout(left + 5)  # the head node's deadline, which may be later, comes first
                    verdict = connection.makefile().readline()
                    if verdict:
                        problem = json.loads(verdict).get("problem")
                        if problem:
                            raise HostError(problem)
                        return
                error = "its port is another program's"
        except OSError as reason:
            error = reason.strerror or str(reason)
        if not told and left < args.timeout - 2:
            say(f"waiting for the head node at {args.head} port {args.port}, at most {args.timeout:g} s ({error})")
            told = True
        time.sleep(0.2)
    raise HostError(
        f"{HOST} could not meet the head node at {args.head} port {args.port} within {args.timeout:g} s, from its own "
        f"address {args.address} ({error}): start the same command there, check firewalls, or give another --interface"
    )


def watch(head: str, port: int) -> None:
    """Fork a process that ends this one, torchrun by then, when it is cut off from the head node and has no ranks left.

    It would else wait in its store until the link is back, deaf to SIGTERM. (While it waits for the others to end their
    ranks it has none, either: then the head node answers.)
    """
    torchrun = os.getpid()
    if os.fork() == 0:
        try:
            _watch(torchrun, head, port)
        finally:
            os._exit(0)


def _watch(torchrun: int, head: str, port: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: go with it
    seen = time.monotonic()
    while os.getppid() == torchrun:
        time.sleep(1)
        if _has_ranks(torchrun) or _answers(head, port):
            seen = time.monotonic()
        elif time.monotonic() > seen + LOST_AFTER:
            say(f"error: {HOST} has no ranks any more and no connection to the head node {head}: ending torchrun")
            os.kill(torchrun, signal.SIGKILL)


def _has_ranks(torchrun: int) -> bool:
    threads = Path(f"/proc/{torchrun}/task").glob("*/children")
    try:
        children = {child for thread in threads for child in thread.read_text().split()}
    except OSError:  # a thread ended just now: look again
        return _has_ranks(torchrun)
    return children != {str(os.getpid())}


def _answers(head: str, port: int) -> bool:
    try:
        socket.create_connection((head, port), 3).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
