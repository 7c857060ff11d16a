"""`name_layers`: layers learn their path in the model, which errors then name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from ._layer import Synchronised
from ._names import Name, plain
from .errors import InputError

M = TypeVar("M", bound=nn.Module)


def name_layers(module: M) -> M:
    """Tell every SyncBatchNorm in `module`, made or converted, its dotted path there, in place.

    The name stands in errors, `in layer 'backbone.bn1', forward, call 9: ...`, and ranks compare it: two layers of one
    width in another order are a `MismatchError`, if they have names. `convert_sync_batchnorm` names what has no name
    yet; this names all anew. Wrappers (DDP, FSDP, torch.compile) are no part of a name. Issues no collective.

    Args:
        module: the model, the same on every rank.

    Returns:
        `module` itself.

    Raises:
        InputError: it has no SyncBatchNorm.

    Example:
        >>> from torch import nn
        >>> from syncbn import SyncBatchNorm
        >>> model = name_layers(nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4)))
        >>> list(layer_names(model))
        ['1']
    """
    layers = list(_layers(module))
    if not layers:
        raise InputError(
            f"{type(module).__name__} has no SyncBatchNorm: convert_sync_batchnorm(model) first, which names its layers"
        )
    for path, layer in layers:
        layer._name = Name(path)
    return module


def name_unnamed(module: nn.Module) -> None:
    """Name the layers that have no name yet; all of them, if two would have one name."""
    layers = list(_layers(module))
    for path, layer in layers:
        if not layer._name.text:
            layer._name = Name(path)
    if len({layer._name.text for _, layer in layers}) < len(layers):
        for path, layer in layers:
            layer._name = Name(path)


def layer_names(module: nn.Module) -> dict[str, Synchronised]:
    """Return the layers in `module` by name.

    Raises:
        InputError: two layers have one name, or one has none.
    """
    found: dict[str, Synchronised] = {}
    for path, layer in _layers(module):
        name = layer._name.text
        if name in found or not name:
            reason = f"is called {name!r}, as another one is" if name else "has no name"
            raise InputError(f"the layer at {path!r} {reason}: call syncbn.name_layers(model)")
        found[name] = layer
    return found


def _layers(module: nn.Module) -> Iterator[tuple[str, Synchronised]]:
    """Yield the layers of ours with their paths, those in a wrapper by the path within it."""
    for path, layer in module.named_modules():
        if isinstance(layer, Synchronised):
            yield plain(path), layer
