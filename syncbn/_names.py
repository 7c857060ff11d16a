"""What layers are called: in errors, and in what the ranks compare."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .comm._place import Place, place

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Places(NamedTuple):
    """The places of one layer that ask for sums."""

    forward: Place
    backward: Place
    derivative: Place  # of the backward


@functools.cache  # as many as there are layers
def places_of(name: str, channels: int) -> Places:
    """Return the places of a layer; without a name, of `sync_batch_norm`."""
    return _places(f"layer {name!r}" if name else "sync_batch_norm", channels)


@functools.cache
def places_of_several(layers: tuple[tuple[str, int], ...]) -> Places:
    """Return the places of layers that share their sums, each a name and its channels."""
    return _places(
        f"layers {', '.join(repr(name) for name, _ in layers)} together", sum(channels for _, channels in layers)
    )


def _places(who: str, channels: int) -> Places:
    directions = ("forward", "backward", "derivative of backward")
    return Places(*(place(f"{who}, {direction}", f"{channels} channels") for direction in directions))


class Name:
    """A layer's name, and the number that stands for it in compiled code.

    torch.compile makes code anew for each value of a string, and so would for each layer; not for that of a tensor.
    Copies share it; a pickle keeps the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.number = _number_of(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Name:
        return self

    def __reduce__(self) -> tuple[type[Name], tuple[str]]:
        return Name, (self.text,)


_texts: list[str] = []


@functools.cache
def _number_of(text: str) -> Tensor:
    _texts.append(text)
    return torch.tensor(len(_texts) - 1, device="cpu")


def text_of(number: Tensor) -> str:
    """Return the name that a number stands for."""
    return _texts[int(number.item())]


UNNAMED = Name("")


def plain(path: str) -> str:
    """Return the path of a module without the wrappers of DDP, FSDP, torch.compile and checkpointing.

    Example:
        >>> plain("module._orig_mod.backbone.bn1")
        'backbone.bn1'
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)
