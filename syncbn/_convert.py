"""BatchNorm -> SyncBatchNorm and back, in place: the same object gets another class."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal, TypeVar, overload

from torch import nn

from ._conversion_report import ConversionReport, Skip, plan
from ._fusion import fused_norms, undo_fusions
from ._layer import LEAF, SyncBatchNorm, Synchronised
from ._name_layers import name_unnamed
from ._synchronised_class import Converted
from .comm._groups import Group, ProcessGroup, check_spec, is_first
from .errors import ConversionError

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger("syncbn")


@overload
def convert_sync_batchnorm(
    module: M, process_group: ProcessGroup = None, *, skip: Skip = (), dry_run: Literal[False] = False
) -> M: ...
@overload
def convert_sync_batchnorm(
    module: nn.Module, process_group: ProcessGroup = None, *, skip: Skip = (), dry_run: Literal[True]
) -> ConversionReport: ...
def convert_sync_batchnorm(
    module: M, process_group: ProcessGroup = None, *, skip: Skip = (), dry_run: bool = False
) -> M | ConversionReport:
    """Make every BatchNorm1d/2d/3d and nn.SyncBatchNorm in `module` synchronise, in place.

    Each keeps its identity: parameters, buffers, hooks, flags and aliases stay, an optimizer made before still updates
    it, `isinstance(layer, nn.BatchNorm2d)` stays true. `revert_sync_batchnorm` undoes it. Converting twice is
    converting once. Other modules (InstanceNorm, GroupNorm) are not touched. Issues no collective.

    A subclass with a forward of its own (timm's BatchNormAct2d; one that returns `super().forward(x).relu()`) keeps it.
    What is synchronised in training is its call of `super().forward`, `F.batch_norm` or `torch.batch_norm`, with the
    running statistics that it gives. If it counts num_batches_tracked itself, so it does when a checkpoint repeats it.

    An nn.SyncBatchNorm keeps its own process group where `process_group` is None. It is no longer an
    `nn.SyncBatchNorm` then, so that DDP takes it on a CPU too. Horovod's, apex's and detectron2's layers, which are
    nn.BatchNorms that synchronise by themselves, are converted as well, from then on with our forward.

    A model in DDP or torch.compile is converted within it.

    The report goes to the logger "syncbn" on the first replica: as a warning where something looks like a batch norm
    layer and is none, or where nothing is synchronised, else as information.

    Args:
        module: the model, or a norm layer itself; not wrapped in FSDP.
        process_group: the replicas, see `SyncBatchNorm`.
        skip: what is left as it is: paths of modules, classes, or a function of path and module; one or several. What
            is inside a module that is skipped is skipped.
        dry_run: change nothing, and return the report.

    Returns:
        `module` itself; in a dry run the report.

    Raises:
        ConversionError: a norm layer is lazy, its forward was replaced on the object, it derives from nn.SyncBatchNorm
            and changes it, or the model is in FSDP; all of them are named. Or `skip` names what is not there. Nothing
            has been changed then.
        GroupError: `process_group` is not a group.

    Example:
        >>> from torch import nn
        >>> convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))[1]  # doctest: +ELLIPSIS
        SyncBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
        >>> print(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), skip="0", dry_run=True))
        norm layers: 1 converted, 1 skipped, 0 refused, 0 left
          converted 1: BatchNorm2d
          skipped 0: skip='0'
    """
    check_spec(process_group)
    pairs, ours, report = plan(module, skip)  # all checks come before the first change
    if dry_run:
        return report
    if report.refused:
        reasons = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in report.refused.items())
        raise ConversionError(f"cannot be converted, and nothing was (skip=[...] leaves them out): {reasons}")
    # A layer that synchronised already has its group in an attribute, which gives way to our property.
    has_group = [cls._is_synchronised and "process_group" in vars(layer) for layer, cls in pairs]
    groups = [Group(layer.process_group) if has else None for (layer, _), has in zip(pairs, has_group, strict=True)]
    for (layer, cls), group in zip(pairs, groups, strict=True):
        if group is not None:
            del vars(layer)["process_group"]
        layer._original_group, layer._group = group, group or Group()
        layer.__module__ = LEAF
        layer.__class__ = cls
        ours.append(layer)
    name_unnamed(module)
    if process_group is not None:
        for layer in ours:
            layer._group = Group(process_group)
    _log(report, module)
    return module


def _log(report: ConversionReport, module: nn.Module) -> None:
    if is_first():
        nothing = not any(isinstance(m, Synchronised) for m in module.modules())
        log.log(logging.WARNING if nothing or report.left else logging.INFO, "convert_sync_batchnorm: %s", report)


def reverted(module: M) -> M:
    """Return a deep copy of `module` in which every converted layer has its original class back.

    For what takes the model elsewhere: `torch.save` of a whole model that opens without syncbn, torch.jit.script,
    quantisation, folding into convolutions, torch's own converter. The copy shares nothing with `module`, and is on the
    same devices. Of a model in DDP or torch.compile, copy what is inside. Issues no collective.

    Raises:
        ConversionError: as `revert_sync_batchnorm`.

    Example:
        >>> from torch import nn
        >>> model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
        >>> type(reverted(model)[0]).__name__, type(model[0]).__name__
        ('BatchNorm1d', 'SyncBatchNorm1d')
    """
    return revert_sync_batchnorm(copy.deepcopy(module))


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
        >>> revert_sync_batchnorm(convert_sync_batchnorm(nn.BatchNorm1d(4)))  # doctest: +ELLIPSIS
        BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, ...track_running_stats=True)
    """
    fused = fused_norms(module)
    converted: list[Any] = [m for m in module.modules() if isinstance(m, Converted)]
    for layer in converted:
        if "_original_class" not in vars(type(layer)):
            raise ConversionError(
                f"{type(layer).__name__} was made from a converted layer: undo that first (remove the parametrization, "
                "unwrap the model), then revert"
            )
        if layer._activation is not None and layer not in fused:
            raise ConversionError(
                f"{type(layer).__name__} applies {layer._activation}, which {layer._original_class.__name__} cannot: "
                "set activation=None, and apply it behind the layer"
            )
    undo_fusions(module, fused)
    for layer in converted:
        original, group = layer._original_class, layer.__dict__.pop("_original_group")
        del layer._group
        layer.__dict__.pop("_activation", None)
        layer.__dict__.pop("_name", None)
        layer.__dict__.pop("__module__", None)
        layer.__class__ = original
        if group is not None:
            layer.process_group = group.spec
    return module


SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)
