"""Which class synchronises a given norm layer: `Sync<Original>`, made once from the original."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ._generated import Generated
from ._layer import SyncBatchNorm, Synchronised
from ._own_forward import OwnForward, has_own_forward
from .errors import ConversionError

# Layers of other frameworks that synchronise by themselves, on nn.BatchNorm's state: their forward is not kept.
_OTHERS = {
    ("apex.parallel.optimized_sync_batchnorm", "SyncBatchNorm"),
    ("apex.parallel.sync_batchnorm", "SyncBatchNorm"),
    ("detectron2.layers.batch_norm", "NaiveSyncBatchNorm"),
    ("horovod.torch.sync_batch_norm", "SyncBatchNorm"),
}


class Converted(Generated):
    """Marks the generated classes."""


def class_for(layer: Any) -> Any:
    """Return the class that synchronises `layer`, a norm layer that is not ours.

    Raises:
        ConversionError: there is none that would leave the rest of what the layer does as it is.
    """
    if "forward" in layer.__dict__:
        raise ConversionError("its forward was replaced on the object itself: take that off first, or convert before")
    original: Any = type(layer)
    for attribute in ("fuse_relu", "channel_last") if _synchronises(original) else ():
        if getattr(layer, attribute, False):
            raise ConversionError(f"it was made with {attribute}=True: make it without, and convert then")
    own = tuple(name for name in ("activation", "process_group") if _has(layer, name))
    if not parametrize.is_parametrized(layer):
        return _synchronised(original, own)
    # torch gave the layer a class of its own, and goes back to its first base when the parametrization is removed.
    base = _synchronised(original.__bases__[0], own)
    properties = {name: value for name, value in vars(original).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), {**properties, "_original_class": original})


def _has(layer: Any, name: str) -> bool:
    """Whether the layer has an attribute of its own where ours would be; the group of a synchronised one becomes ours.

    One of its class stands before ours anyway.
    """
    if name == "process_group" and _synchronises(type(layer)):
        return False
    return any(name in place for place in (layer.__dict__, layer._modules, layer._parameters, layer._buffers))


def _synchronises(cls: type) -> bool:
    return issubclass(cls, nn.SyncBatchNorm) or any((base.__module__, base.__name__) in _OTHERS for base in cls.__mro__)


class _Own:
    """Stands where a property of ours would hide an attribute that the layer had before."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        raise AttributeError  # so that nn.Module looks among its children


@functools.cache
def _synchronised(original: Any, own: tuple[str, ...]) -> Any:
    """Return the class `Sync<Original>(Original, Synchronised)`; to isinstance a SyncBatchNorm.

    Args:
        original: the class of the layer.
        own: names of ours that are attributes of the layer.
    """
    if issubclass(original, nn.modules.lazy.LazyModuleMixin):
        raise ConversionError("it has no shape yet: run one batch through the model first, then convert")
    namespace: dict[str, Any] = {
        "__doc__": f"{original.__name__} with the statistics of all replicas.",
        "__module__": __name__,
        "_original_class": original,
        "_made_by": staticmethod(_synchronised),
        "_made_from": (original, own),
        "_is_synchronised": _synchronises(original),
        **{name: _Own() for name in own},
    }
    name = f"Sync{original.__name__}"
    bases: tuple[type, ...]
    if issubclass(original, nn.SyncBatchNorm):  # no base of ours: DDP refuses CPU modules that contain one
        _refuse_changed(original)
        name, bases = original.__name__, (Synchronised,)
        namespace["_check_input_dim"] = original._check_input_dim
    elif _synchronises(original):
        bases = (Synchronised, original)  # whose forward is not reached
    elif has_own_forward(original):
        bases = (OwnForward, original, Synchronised)
    else:
        bases = (original, Synchronised)
    if not issubclass(original, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        bases = (*bases, nn.BatchNorm2d)  # filters look for one of the three
    return SyncBatchNorm.register(type(name, (Converted, *bases), namespace))


def _refuse_changed(original: Any) -> None:
    """Refuse a subclass of nn.SyncBatchNorm that is more than a name and a check of dimensions (as mmcv's SyncBN)."""
    bases = original.__mro__[: original.__mro__.index(nn.SyncBatchNorm)]
    for name in {name for base in bases for name in vars(base)} - {"_check_input_dim"}:
        if not (name.startswith("__") and name.endswith("__")) or name == "__call__":
            raise ConversionError(
                f"it derives from nn.SyncBatchNorm, which ours is not, and its `{name}` would be lost: let it derive "
                "from syncbn.SyncBatchNorm, or from nn.BatchNorm2d"
            )
