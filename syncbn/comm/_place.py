"""What a sum is for: what the ranks compare before they trust it, and what messages name."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

_BITS = (1 << 63) - 1
_ODD = 0x9E3779B97F4A7C15  # so that neighbouring numbers are far apart


class Place:
    """A place of the program that asks for sums: `layer 'backbone.bn1', forward` with `64 channels`. Made by `place`.

    Attributes:
        text: names it.
        detail: what else has to be the same on every rank.
        digest: of both, 63 bits.
    """

    __slots__ = ("detail", "digest", "text")

    def __init__(self, text: str, detail: str) -> None:
        self.text, self.detail = text, detail
        digest = hashlib.blake2b(f"{text}\n{detail}".encode(), digest_size=8).digest()
        self.digest = int.from_bytes(digest, "big") & _BITS


@functools.cache  # as many as a program has places
def place(text: str, detail: str = "") -> Place:
    """Return the place of this name, the same object each time."""
    made = Place(text, detail)
    _made[made.digest] = made
    return made


_made: dict[int, Place] = {}  # by digest


def place_of(digest: int) -> Place:
    """Return the place with this digest, which may be one that only other ranks have been at."""
    known = _made.get(digest)
    if known is None:
        known = Place("a sum that only other ranks know", "")
        known.digest = digest
    return known


class Call(NamedTuple):
    """One sum: a place, and how often that has asked its communicator for one, this time included."""

    place: Place
    number: int

    @property
    def signature(self) -> int:
        """A number of 63 bits that is the same on all ranks that are at the same call."""
        return (self.place.digest + self.number * _ODD) & _BITS

    def __str__(self) -> str:
        return f"{self.place.text}, call {self.number}"


ALL_REDUCE = place("all_reduce")  # called by somebody who gives no place
