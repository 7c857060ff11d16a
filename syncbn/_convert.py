"""BatchNorm -> SyncBatchNorm and back, in place: the same object gets another class."""

from __future__ import annotations

import functools
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ._epilogue import NAMES, Activation, known_activation
from ._fusion import fused_norms, is_bare, undo_fusions
from ._generated import Generated
from ._layer import LEAF, SyncBatchNorm, Synchronised
from .comm._groups import Group, ProcessGroup, check_spec
from .errors import ConversionError

M = TypeVar("M", bound=nn.Module)

_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def convert_sync_batchnorm(module: M, process_group: ProcessGroup = None) -> M:
    """Make every BatchNorm1d/2d/3d and nn.SyncBatchNorm in `module` synchronise, in place.

    Each keeps its identity: parameters, buffers, hooks, flags and aliases stay, an optimizer made before still updates
    it, `isinstance(layer, nn.BatchNorm2d)` stays true. `revert_sync_batchnorm` undoes it. Converting twice is
    converting once. Other modules (InstanceNorm, GroupNorm) are not touched. Issues no collective.

    timm's BatchNormAct2d is taken with its activation, if that is one which `SyncBatchNorm` can apply: the layer goes
    by its `act`, also if that is replaced later. `fuse_activations` does the like for other models.

    An nn.SyncBatchNorm keeps its own process group where `process_group` is None. It is no longer an
    `nn.SyncBatchNorm` then, so that DDP takes it on a CPU too.

    Args:
        module: the model, or a norm layer itself; not yet wrapped in DDP or FSDP.
        process_group: the replicas, see `SyncBatchNorm`.

    Returns:
        `module` itself.

    Raises:
        ConversionError: a norm layer is lazy, has a forward of its own, or is a BatchNormAct2d with another activation
            or with dropout, or the model is wrapped already. Nothing has been changed then.
        GroupError: `process_group` is not a group.

    Example:
        >>> from torch import nn
        >>> convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))[1]
        SyncBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    check_spec(process_group)
    _refuse_wrapped(module)
    layers: list[Any] = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, Synchronised)]
    classes = [_class_for(layer) for layer in layers]  # all checks come before the first change
    # nn.SyncBatchNorm keeps its group in an attribute, which gives way to our property and comes back in revert.
    groups = [Group(layer.__dict__.get("process_group")) for layer in layers]
    for layer, cls, group in zip(layers, classes, groups, strict=True):
        layer.__dict__.pop("process_group", None)
        layer._original_group = layer._group = group
        layer.__module__ = LEAF
        layer.__class__ = cls
    if process_group is not None:
        for m in module.modules():
            if isinstance(m, Synchronised):
                m.process_group = process_group
    return module


def _refuse_wrapped(module: nn.Module) -> None:
    for m in module.modules():
        if _WRAPPERS & {base.__name__ for base in type(m).__mro__}:
            raise ConversionError(
                f"{type(m).__name__} holds references to the parameters and buffers it was made with: convert the "
                "model first, then wrap it"
            )


def revert_sync_batchnorm(module: M) -> M:
    """Give every converted layer in `module` its original class back, in place: the inverse of the conversion.

    What `fuse_activations` did is undone as well. Parameters, buffers and everything else stay. Layers that were made
    as `SyncBatchNorm` have no original class and stay what they are. Issues no collective.

    Returns:
        `module` itself.

    Raises:
        ConversionError: a layer's class was changed after its conversion (by a parametrization, by FSDP2), a layer was
            given an activation that its original class cannot apply, or what was fused was changed since. Nothing has
            been changed then.

    Example:
        >>> from torch import nn
        >>> revert_sync_batchnorm(convert_sync_batchnorm(nn.BatchNorm1d(4)))
        BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    fused = fused_norms(module)
    converted: list[Any] = [m for m in module.modules() if isinstance(m, _Converted)]
    for layer in converted:
        if "_original_class" not in vars(type(layer)):
            raise ConversionError(
                f"{type(layer).__name__} was made from a converted layer: undo that first (remove the parametrization, "
                "unwrap the model), then revert"
            )
        if layer._activation is not None and layer not in fused and type(layer)._activation is None:
            raise ConversionError(
                f"{type(layer).__name__} applies {layer._activation}, which {layer._original_class.__name__} cannot: "
                "set activation=None, and apply it behind the layer"
            )
    undo_fusions(module, fused)
    for layer in converted:
        original, group = layer._original_class, layer.__dict__.pop("_original_group")
        del layer._group
        layer.__dict__.pop("_activation", None)
        layer.__dict__.pop("__module__", None)
        layer.__class__ = original
        if original is nn.SyncBatchNorm:
            layer.process_group = group.spec
    return module


class _Converted(Generated):
    """Marks the generated classes."""


def _class_for(layer: Any) -> Any:
    """Return the class that synchronises `layer`, or raise ConversionError."""
    if "forward" in layer.__dict__:
        raise ConversionError(
            f"the forward of this {type(layer).__name__} was replaced on the object itself: take that off first, or "
            "convert before"
        )
    if "process_group" in layer.__dict__ and not isinstance(layer, nn.SyncBatchNorm):
        raise ConversionError(
            f"{type(layer).__name__} has a `process_group` of its own, which would be lost: rename it"
        )
    original: Any = type(layer)
    if _has_forward_of_timm(original):
        _activation_of(layer)
        if not (is_bare(layer.act) and is_bare(layer.drop)):
            raise ConversionError(
                f"`act` or `drop` of this {original.__name__} has hooks, or a forward put on the object, which would "
                "not be called: take them off first"
            )
    if not parametrize.is_parametrized(layer):
        return _synchronised(original)
    # torch gave the layer a class of its own, and goes back to its first base when the parametrization is removed.
    base = _synchronised(original.__bases__[0])
    properties = {name: value for name, value in vars(original).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), {**properties, "_original_class": original})


@functools.cache
def _synchronised(original: Any) -> Any:
    """Return the class `Sync<Original>(Synchronised, Original)`, made once; to isinstance a SyncBatchNorm."""
    name = f"{original.__module__}.{original.__qualname__}"
    if issubclass(original, nn.modules.lazy.LazyModuleMixin):
        raise ConversionError(f"{name} has no shape yet: run one batch through the model first, then convert")
    if issubclass(original, nn.SyncBatchNorm) and original is not nn.SyncBatchNorm:
        raise ConversionError(f"{name} derives from nn.SyncBatchNorm: let it derive from syncbn.SyncBatchNorm")
    activates = _has_forward_of_timm(original)
    if not activates and original.forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise ConversionError(
            f"{name} has a forward of its own, which would be lost: convert the other submodules one by one, or let it "
            "derive from syncbn.SyncBatchNorm"
        )
    namespace: dict[str, Any] = {
        "__doc__": f"{original.__name__} with the statistics of all replicas.",
        "__module__": __name__,
        "_original_class": original,
        "_made_by": staticmethod(_synchronised),
        "_check_input_dim": original._check_input_dim,
    }
    if activates:
        namespace["_activation"] = property(_activation_of, _refuse_activation)
    if original is nn.SyncBatchNorm:  # not a base: DDP refuses CPU modules that contain one; filters look for the other
        name, base = "SyncBatchNorm", nn.BatchNorm2d
    else:
        name, base = f"Sync{original.__name__}", original
    return SyncBatchNorm.register(type(name, (_Converted, Synchronised, base), namespace))


# timm's BatchNormAct2d: y = act(drop(norm(x))), where `act` and `drop` are children of the layer


def _has_forward_of_timm(cls: Any) -> bool:
    """Whether instances of `cls` run timm's forward, as timm wrote it."""
    return any(
        (base.__module__, base.__name__) == ("timm.layers.norm_act", "BatchNormAct2d")
        and vars(base).get("forward") is cls.forward
        and cls.forward.__qualname__ == "BatchNormAct2d.forward"
        for base in cls.__mro__
    )


def _activation_of(layer: Any) -> Activation | None:
    """Return what `act` is now; it may be replaced at any time."""
    if type(layer.drop) is not nn.Identity:
        raise ConversionError(
            f"{layer.drop} as `drop` of the BatchNormAct2d, before `act`, would be lost: set it to nn.Identity()"
        )
    activation = known_activation(layer.act)
    if activation is None and type(layer.act) is not nn.Identity:
        raise ConversionError(
            f"{layer.act} as `act` of the BatchNormAct2d cannot be fused, only {', '.join(NAMES)} of torch.nn can: set "
            "`act` to one of these, or to nn.Identity() and apply it behind the layer"
        )
    return activation


def _refuse_activation(layer: Any, value: object) -> NoReturn:
    raise ConversionError(f"{type(layer).__name__} takes its activation from `act`: set that")


SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)
