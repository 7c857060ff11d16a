"""Ranks that have nothing left to add answer the sums of the others with zeros, until nobody has more."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from syncbn.errors import MismatchError

from ._carried import verdict_of
from ._place import Call, Place, place, place_of
from ._protocol import BaseCommunicator
from ._verdict import AGREE, OTHER_VECTOR

_MESSAGE = place("uneven inputs")
_STEP = place("uneven inputs, the next batch")
_FINISHED = place("uneven inputs, no batch left")
_BITS = 21  # of a number in a message: sums of their squares are exact among 2048 ranks
_NOTHING = (-1, 0, 0, 0, 0, 0, 0)  # no sum: a step begins


class RollCall:
    """Tells the ranks of `comm` of one another, while some of them may have finished.

    Each `step` of a rank sums a message, by which all know whether some have finished. From then on a message goes
    before each sum of `members` too and says what that is: `answer` needs no record of earlier ones. A message is
    `[1, h, h², ...]` from a rank that is not finished, and zeros from one that is, so it also tells whether the former
    agree (see `Carrying`).

    Args:
        comm: carries the messages.
        members: the communicators whose sums are answered, in the same order on every rank; of `comm`'s ranks.
        device: of vectors that are not on the CPU.
        message_device: of messages.
    """

    def __init__(
        self,
        comm: BaseCommunicator,
        members: Sequence[BaseCommunicator],
        device: torch.device,
        message_device: torch.device,
    ) -> None:
        self._comm = comm
        self._members = members
        self._devices = {0: device, 1: torch.device("cpu")}
        self._message_device = message_device
        self._complete = True  # nobody has finished
        self._steps = 0
        for number, member in enumerate(members):
            member.tell(partial(self._announce, number))

    def close(self) -> None:
        """Announce no more sums."""
        for member in self._members:
            member.tell(None)

    def step(self) -> None:
        """Begin a step: this rank has another batch. One sum of ten numbers."""
        self._steps += 1
        active, _ = self._exchange(_NOTHING, Call(_STEP, self._steps))
        self._complete = active == self._comm.size

    def _announce(self, number: int, x: Tensor, place: Place) -> None:
        """Say which sum comes, if there is somebody who cannot know."""
        if self._complete or place is _MESSAGE:
            return
        digest = (place.digest >> shift & (1 << _BITS) - 1 for shift in (0, _BITS, 2 * _BITS))
        sum_of = (number, x.numel(), x.dtype == torch.float64, x.is_cpu, *digest)
        self._exchange(sum_of, Call(place, self._members[number].calls(place) + 1), x)

    def answer(self) -> int:
        """Add zeros to every sum until no rank has another batch; return a rank that took the last step."""
        self.close()
        missed = False
        while True:
            active, told = self._exchange(None, Call(_FINISHED, self._steps))
            if not active:
                return self._first_without(missed)
            number, numel, double, on_cpu, *digest = told
            if number < 0:
                missed = True
                continue
            dtype = torch.float64 if double else torch.float32
            zeros = torch.zeros(numel, dtype=dtype, device=self._devices[on_cpu])
            whole = sum(part << shift for part, shift in zip(digest, (0, _BITS, 2 * _BITS), strict=True))
            self._members[number].all_reduce(zeros, place_of(whole))

    def _exchange(self, says: Sequence[int] | None, call: Call, x: Tensor | None = None) -> tuple[int, list[int]]:
        """Return how many ranks are not finished, and what they say; MismatchError on every rank if that differs.

        Its table says where this rank is: `call`, with the vector `x`.
        """
        h = zlib.crc32(repr(says).encode()) >> 12
        numbers = [0] * (3 + len(_NOTHING)) if says is None else [1, h, h * h, *map(int, says)]
        message = self._vector(numbers)
        told = self._comm.all_reduce(message, _MESSAGE).cpu()
        if verdict_of(told[:3]) != AGREE:
            self._refuse(call, message if x is None else x)
        active, _, _, *said = map(int, told.tolist())
        return active, [number // max(active, 1) for number in said]

    def _refuse(self, call: Call, x: Tensor) -> None:
        try:
            self._comm._disagree(OTHER_VECTOR, call, x)
        except MismatchError as error:
            self._comm.fail(str(error), peers_know=True)
            raise

    def _first_without(self, missed: bool) -> int:
        flags = [0] * self._comm.size
        flags[self._comm.rank] = not missed
        return self._comm.all_reduce(self._vector(flags), _MESSAGE).tolist().index(1)

    def _vector(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self._message_device)
