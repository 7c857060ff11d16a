"""Where the hosts of a torchrun job meet, tried out before torch is imported: what can be wrong is said at once."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ._addresses import HOST, HostError, listener


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

    def come(self) -> socket.socket | None:
        """Return the socket that the head node listens on; on another host, wait until there is a connection to it.

        Raises:
            HostError: the port is taken, or no connection could be made in time.
        """
        if self.listen is not None:
            return listener(self.listen, self.port)
        deadline = time.monotonic() + self.timeout
        hint = threading.Timer(2, say, [f"no head node at {self.head} port {self.port} yet; waiting for it"])
        hint.daemon = True
        hint.start()
        while True:
            try:
                socket.create_connection((self.head, self.port), 5, (self.address, 0)).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise HostError(self.unmet(error.strerror or str(error))) from None
                time.sleep(0.2)
            else:
                hint.cancel()
                return None

    def unmet(self, error: str) -> str:
        """Say that the head node is out of reach."""
        return (
            f"{HOST} could not meet the head node at {self.head} port {self.port} within {self.timeout:g} s, from its "
            f"own address {self.address} ({error}): start the same command there, check firewalls, check that "
            "--master means the same address there (it listens only at that), or give another --interface"
        )

    def end_unless_answered(self) -> threading.Timer:
        """Have this process end in time. TCPStore waits for ever for a program that listens and is no store.

        It may know better, so it goes first.
        """

        def end() -> None:
            say(f"error: {self.unmet('the head node ended, or another program has the port')}")
            os._exit(1)

        timer = threading.Timer(self.timeout + 2, end)
        timer.daemon = True
        timer.start()
        return timer


def read(arguments: Sequence[str]) -> Meeting | None:
    """Read what `_torchrun` has written: nothing where all ranks are on one host."""
    if not arguments:
        return None
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option, kind in {"--head": str, "--port": int, "--nodes": int, "--timeout": float, "--address": str}.items():
        parser.add_argument(option, type=kind, required=True)
    parser.add_argument("--listen")
    return Meeting(**vars(parser.parse_args(arguments)))
