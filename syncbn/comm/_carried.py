"""Signatures that travel in the vector itself: for backends that add what they are given and compare nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import MismatchError

from ._place import Call
from ._protocol import BaseCommunicator, kind_of
from ._verdict import AGREE, OTHER_PLACE, OTHER_VECTOR, all_alike, exact_bits, refuse, setting

_NUMBERS = 3
_MANTISSA = {torch.float64: 53, torch.float32: 24}  # bits of the integers that it holds exactly


class Carrying(BaseCommunicator):
    """A communicator whose vectors carry the signature: `[x, 1, h, h²]`, three numbers more. A backend supplies `_add`.

    h is what of the signature fits, so that the sums are exact: all ranks sent the same if and only if
    (Σh)² = Σ1·Σh² (Cauchy and Schwarz). A rank that sends zeros takes no part. Two different signatures look alike once
    in 2²⁶ times between two ranks and 2²¹ among a thousand; of a float32 vector 2¹¹ and 2⁷.

    On an accelerator nobody waits for the verdict: see `Verdicts`. Vectors of different lengths are not seen, unless
    `init(check=True)` has a sum of three numbers made before each: then on every rank, which waits for it.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._verdicts = Verdicts()

    @abstractmethod
    def _add(self, x: Tensor) -> Tensor:
        """Return the sum of `x`, a vector, over the ranks."""

    def _sum(self, x: Tensor, signature: int) -> tuple[Tensor, int]:
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured:
            self._verdicts.look(self.call)
            if setting() and not self._alike(x, signature):
                return x, OTHER_VECTOR
        # A graph is replayed with this call's number: it takes no part in the comparison, as zeros do not.
        signed = x.new_zeros(_NUMBERS) if captured else self._signed(x, signature)
        total = self._add(torch.cat([x.flatten(), signed]))
        values, sums = total[:-_NUMBERS].view(x.shape), total[-_NUMBERS:]
        if x.is_cpu:
            return values, verdict_of(sums)
        if not captured:
            self._verdicts.later(sums, self.call)
        return values, AGREE

    def _alike(self, x: Tensor, signature: int) -> bool:
        """Tell whether the ranks' vectors are for one place, of one length and dtype; one sum of three numbers."""
        sent = x.new_empty(0, dtype=torch.float64)
        return verdict_of(self._add(self._signed(sent, signature + kind_of(x)))) == AGREE

    def _signed(self, x: Tensor, signature: int) -> Tensor:
        h = signature % (1 << exact_bits(self.size, _MANTISSA[x.dtype]))
        signed = torch.tensor([1, h, h * h], dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        return signed.to(x.device, non_blocking=True)  # from pinned memory: the host does not wait


def verdict_of(sums: Tensor) -> int:
    numbers = sums.tolist()
    if not all(map(float.is_integer, numbers)):  # what a peer sent there was no signature
        return OTHER_PLACE
    ranks, first, second = map(int, numbers)
    return AGREE if all_alike(ranks, first, second) else OTHER_PLACE


class Verdicts:
    """The verdicts of sums on an accelerator: copied to the host behind the sum, and looked at a step later.

    That is before the next sum of the same place: all ranks come to the same one, and the device has come by then to
    what it waits for. Not run on a GPU.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Call, Tensor, Any]] = deque()

    def later(self, sums: Tensor, call: Call | None) -> None:
        """Copy the verdict of `call`."""
        assert call is not None
        there = torch.empty(_NUMBERS, dtype=sums.dtype, device="cpu", pin_memory=True)
        there.copy_(sums, non_blocking=True)
        event = torch.get_device_module(sums.device).Event()
        event.record()
        self._waiting.append((call, there, event))

    def look(self, call: Call | None) -> None:
        """Raise MismatchError if ranks were at different places in the last sum of this place, or in one before."""
        if call is None or all(earlier.place is not call.place for earlier, _, _ in self._waiting):
            return
        place = None
        while place is not call.place:
            earlier, sums, event = self._waiting.popleft()
            place = earlier.place
            event.synchronize()
            if verdict_of(sums) != AGREE:
                refuse(MismatchError(f"the ranks asked for different sums, this one for that in {earlier}"))
