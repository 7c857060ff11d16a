"""Replicas without processes: one thread each, for tests, teaching and large worlds on a small machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ._protocol import BaseCommunicator, Communicator, part_of
from ._verdict import AGREE, OTHER_PLACE, OTHER_VECTOR

T = TypeVar("T")


class _Room:
    """What the threads of one world share: a slot each, and two barriers per collective."""

    def __init__(self, size: int, timeout: float) -> None:
        self.slots: list[tuple[Tensor, int] | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.timeout = timeout
        self.aborted = False
        self.children: dict[tuple[int, ...], _Room] = {}  # by the ranks of a part, made in `split`
        self.lock = threading.Lock()

    def wait(self) -> None:
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise RuntimeError(f"a thread raised, or did not call within {self.timeout:g} s") from None

    def child(self, part: tuple[int, ...]) -> _Room:
        """Return the room of some of the threads, the same for all of them."""
        with self.lock:
            room = self.children.setdefault(part, _Room(len(part), self.timeout))
            if self.aborted:
                room.abort()
            return room

    def abort(self) -> None:
        """Release everybody who waits here or will."""
        with self.lock:
            self.aborted = True
            self.barrier.abort()
            for child in self.children.values():
                child.abort()


class ThreadReplica(BaseCommunicator):
    """The communicator that `run_threads` hands to each thread. Sums in rank order, so bit-equal everywhere."""

    transport = "threads"

    def __init__(self, rank: int, room: _Room) -> None:
        super().__init__(rank, len(room.slots))
        self._room = room

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        slots = self._room.slots
        slots[self.rank] = x, signature
        self._room.wait()
        vectors, signatures = zip(*filter(None, slots), strict=True)
        verdict = AGREE if len(set(signatures)) == 1 else OTHER_PLACE
        if len({(vector.dtype, tuple(vector.shape)) for vector in vectors}) > 1:
            verdict = OTHER_VECTOR
        else:
            x = vectors[0].clone()
            for vector in vectors[1:]:
                x += vector
        self._room.wait()  # everybody has read: the slots may be filled again
        return x, verdict

    def _give_up(self) -> None:
        self._room.abort()

    def split(self, partition: Sequence[Sequence[int]]) -> Communicator:
        """Return the communicator of the part that holds this rank."""
        part = tuple(part_of(self.rank, partition))
        return ThreadReplica(part.index(self.rank), self._room.child(part))


def run_threads(size: int, fn: Callable[[Communicator], T], *, timeout: float = 60.0) -> list[T]:
    """Run `fn(comm)` on `size` threads, each one replica, and return their results in rank order.

    Args:
        size: number of replicas.
        fn: called once per replica with that replica's communicator.
        timeout: seconds that a replica waits for its peers in one collective.

    Raises:
        ValueError: if `size` is less than 1.
        Exception: the first error of any thread; the others are released from their collectives.

    Example:
        >>> import torch
        >>> run_threads(3, lambda comm: comm.all_reduce(torch.tensor([float(comm.rank)])).item())
        [3.0, 3.0, 3.0]
    """
    if size < 1:
        raise ValueError(f"expected 1 or more replicas, got {size}")
    room = _Room(size, timeout)
    errors: list[BaseException] = []  # in the order of their happening: the first is the cause

    def replica(rank: int) -> T:
        try:
            return fn(ThreadReplica(rank, room))
        except BaseException as error:
            errors.append(error)
            room.abort()
            raise

    grad_enabled = torch.is_grad_enabled()

    def with_grad_mode(rank: int) -> T:
        with torch.set_grad_enabled(grad_enabled):  # thread-local in torch: a new thread starts with grad on
            return replica(rank)

    with ThreadPoolExecutor(size, thread_name_prefix="replica") as pool:
        futures = [pool.submit(with_grad_mode, rank) for rank in range(size)]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
