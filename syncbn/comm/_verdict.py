"""Do the ranks ask for the same sum? What follows where they do not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from syncbn.errors import InputError, MismatchError

from ._place import Call

AGREE, OTHER_PLACE, OTHER_VECTOR = range(3)  # enum Verdict in csrc/shared_memory.cpp; the greater one wins

_CHARACTERS = 240  # of a rank's line in the table
_VARIABLE = "SYNCBN_CHECK"
_given: bool | None = None  # by `syncbn.init(check=)`
log = logging.getLogger("syncbn")


def choose(check: bool | None) -> None:
    """Take what `syncbn.init` was given; None leaves it as it is.

    Raises:
        InputError: SYNCBN_CHECK is not 0 or 1.
    """
    global _given
    if check is not None:
        _given = check
    setting()


def setting() -> bool | None:
    """Return whether a mismatch is looked for beforehand (True), in the sum (None), or only warned of (False).

    Raises:
        InputError: SYNCBN_CHECK is not 0 or 1.
    """
    if _given is not None:
        return _given
    text = os.environ.get(_VARIABLE, "")
    if text not in ("", "0", "1"):
        raise InputError(f"{_VARIABLE}={text!r}: expected 1, 0, or nothing")
    return {"": None, "0": False, "1": True}[text]


def exact_bits(size: int, mantissa: int = 53) -> int:
    """Return of how many bits numbers may be for the sums of `size` of their squares to be exact."""
    return (mantissa - (size - 1).bit_length()) // 2


def all_alike(ranks: int, first: int, second: int) -> bool:
    """Tell whether so many numbers are all the same, from Σh and Σh²: (Σh)² = ranks·Σh² (Cauchy and Schwarz)."""
    return first * first == ranks * second


def refuse(error: MismatchError) -> None:
    """Raise `error`, or warn where that is wanted."""
    if setting() is not False:
        raise error
    log.warning("%s", error)


def gather(call: Call, x: Tensor, rank: int, size: int, add: Callable[[Tensor], Tensor]) -> MismatchError:
    """Return the error that says where every rank is, the same on each: one sum, that all of them call.

    Args:
        call: where this rank is.
        x: what it was about to add.
        rank: this rank.
        size: number of ranks.
        add: returns the sum of a float64 vector over the ranks.
    """
    mine = "\n".join(row(call, x)).encode()[-_CHARACTERS:]
    rows = torch.zeros(size, _CHARACTERS, dtype=torch.float64, device="cpu")
    rows[rank, : len(mine)] = torch.tensor(list(mine), dtype=torch.float64, device="cpu")
    told = add(rows.flatten()).view(size, -1).to(torch.uint8).tolist()
    lines = [bytes(text).rstrip(b"\0").decode(errors="replace").split("\n") for text in told]
    return MismatchError(table(lines))


def row(call: Call, x: Tensor) -> list[str]:
    """Return a rank's line of `table`."""
    vector = " x ".join([*map(str, x.shape), str(x.dtype).removeprefix("torch.")])
    return [call.place.text, str(call.number), call.place.detail, vector]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return what a mismatch prints: rank, place, number of the call, detail and length of the vector.

    Example:
        >>> print(table([["layer 'a', forward", "9", "64 channels", "129 x float64"],
        ...              ["layer 'b', forward", "9", "", "7 x float32"]]))
        the ranks ask for different sums
        rank 0: layer 'a', forward, call 9 (64 channels; 129 x float64)
        rank 1: layer 'b', forward, call 9 (7 x float32)
    """
    ranks: dict[str, list[int]] = {}
    for rank, told in enumerate(lines):
        ranks.setdefault(line(told) if len(told) > 1 else "adds zeros (hvd.join)", []).append(rank)
    return "\n".join(
        ["the ranks ask for different sums", *(f"{named(numbers)}: {told}" for told, numbers in ranks.items())]
    )


def line(told: Sequence[str]) -> str:
    """Return a `row` as text."""
    text, number, detail, vector = told
    return f"{text}, call {number} ({'; '.join(filter(None, [detail, vector]))})"


def named(ranks: Sequence[int]) -> str:
    """Return "rank 0", "ranks 0, 2"."""
    shown = [str(rank) for rank in ranks[:8]] + [f"... ({len(ranks)} in all)"] * (len(ranks) > 8)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}"
