"""A sum from messages between two ranks, which say what they are: for backends whose own sum takes what it gets."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ._protocol import BaseCommunicator, kind_of
from ._verdict import AGREE, OTHER_PLACE, OTHER_VECTOR

_HEADER = struct.Struct("=3q")  # `kind_of` the vector, the signature, the verdict so far
_FIRST = 64 << 10  # bytes of a vector that travel with the header: a layer of 4095 channels


class _Message:
    """Memory for one message of any length up to the longest: receiving a shorter one is no error."""

    def __init__(self) -> None:
        memory = bytearray(_HEADER.size + _FIRST)
        self._memory = memory
        self.whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._data = {
            dtype: torch.frombuffer(memory, dtype=dtype, offset=_HEADER.size)
            for dtype in (torch.float32, torch.float64)
        }

    def fill(self, kind: int, signature: int, verdict: int, first: Tensor) -> Tensor:
        """Write it, and return the part of the memory that it takes; a vector that nobody wants is left out."""
        _HEADER.pack_into(self._memory, 0, kind, signature, verdict)
        if verdict == OTHER_VECTOR:
            return self.whole[: _HEADER.size]
        self._data[first.dtype][: first.numel()].copy_(first)
        return self.whole[: _HEADER.size + first.numel() * first.itemsize]

    def header(self) -> tuple[int, int, int]:
        """Return kind, signature and verdict."""
        return _HEADER.unpack_from(self._memory)

    def first(self, like: Tensor) -> Tensor:
        """Return the vector, as long as `like`."""
        return self._data[like.dtype][: like.numel()]


class Pairs(BaseCommunicator):
    """Adds CPU tensors by recursive doubling: in step k, ranks that differ in bit k exchange their sums.

    log2(ranks) round trips. The first message of each two ranks has a header, so lengths that differ are seen before
    anything is added, and all ranks learn of it in the same sum. A backend supplies `_swap`.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._outgoing, self._incoming = _Message(), _Message()

    @abstractmethod
    def _swap(self, peer: int, outgoing: Tensor | None, incoming: Tensor | None) -> None:
        """Send one tensor to rank `peer` and receive another from it, or one of the two; return when that is done."""

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        return self.sum(x, signature, AGREE)

    def sum(self, x: Tensor, signature: int, verdict: int) -> tuple[Tensor, int]:
        """As `_sum`, where `verdict` has been found already."""
        flat = x.view(-1)
        first = flat[: _FIRST // x.itemsize]
        verdict = self._add_first(first, kind_of(x), signature, verdict)
        if first.numel() < flat.numel() and verdict != OTHER_VECTOR:
            self._add_rest(flat[first.numel() :])
        return x, verdict

    def _add_first(self, x: Tensor, kind: int, signature: int, verdict: int) -> int:
        """Add vectors that travel with a header, in place; return the verdict."""
        for peer, sends, receives, final in _schedule(self.rank, self.size):
            self._swap(
                peer,
                self._outgoing.fill(kind, signature, verdict, x) if sends else None,
                self._incoming.whole if receives else None,
            )
            if receives:
                other_kind, other_signature, other_verdict = self._incoming.header()
                verdict = max(verdict, other_verdict, OTHER_PLACE if other_signature != signature else AGREE)
                if other_kind != kind:
                    verdict = OTHER_VECTOR
                if verdict != OTHER_VECTOR:
                    _take(x, self._incoming.first(x), self.rank < peer, final)
        return verdict

    def _add_rest(self, x: Tensor) -> None:
        """Add what follows the first part of long vectors, in place: all ranks know by now that they are alike."""
        other = torch.empty_like(x)
        for peer, sends, receives, final in _schedule(self.rank, self.size):
            self._swap(peer, x if sends else None, other if receives else None)
            if receives:
                _take(x, other, self.rank < peer, final)


def _take(x: Tensor, other: Tensor, ours_first: bool, final: bool) -> None:
    """Add what came, in one order on both sides: the same bits, of a NaN too. Or take it for the sum."""
    if final:
        x.copy_(other)
    elif ours_first:
        x.add_(other)
    else:
        torch.add(other, x, out=x)


def _schedule(rank: int, size: int) -> Iterator[tuple[int, bool, bool, bool]]:
    """Yield whom a rank meets: the peer, whether it sends, whether it receives, and whether that is the final sum.

    The ranks beyond the largest power of two go through a partner.

    Example:
        >>> list(_schedule(2, 3))
        [(0, True, False, False), (0, False, True, True)]
    """
    full = 1 << size.bit_length() - 1
    if rank >= full:
        yield rank - full, True, False, False
        yield rank - full, False, True, True
        return
    if rank + full < size:
        yield rank + full, False, True, False
    for bit in range(full.bit_length() - 1):
        yield rank ^ 1 << bit, True, True, False
    if rank + full < size:
        yield rank + full, True, False, False
