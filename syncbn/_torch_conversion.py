"""torch's own conversion: made ours on request, and loud where it would replace layers of ours."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from torch import nn

from ._convert import convert_sync_batchnorm
from ._layer import Synchronised
from .errors import ConversionError

log = logging.getLogger("syncbn")


def replace_torch_conversion() -> contextlib.ExitStack:
    """Make `nn.SyncBatchNorm.convert_sync_batchnorm` do what `syncbn.convert_sync_batchnorm` does, until undone.

    For trainers with a flag of their own, which call torch's: Lightning's `sync_batchnorm`, Ignite's and fastai's
    `sync_bn`. (mmengine's `sync_bn` is a conversion of its own: see docs/integrations.md.) Call it on every replica
    before the trainer converts, for good, or as a context; `close()` of what is returned undoes it as well. Issues no
    collective.

    Without it, torch's conversion replaces layers of ours by its own, which it does not know from other norm layers;
    since syncbn was imported it says so in the logger "syncbn", and refuses where an activation would be lost.

    Returns:
        What undoes it, a context manager.

    Example:
        >>> from torch import nn
        >>> with replace_torch_conversion():
        ...     type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(4))).__name__
        'SyncBatchNorm1d'
        >>> type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(4))).__name__
        'SyncBatchNorm'
    """
    global _replacements
    _replacements += 1
    nn.SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)  # type: ignore[method-assign]
    stack = contextlib.ExitStack()
    stack.callback(_undo)
    return stack


_replacements = 0  # that are not undone


def _undo() -> None:
    global _replacements
    _replacements -= 1
    if _replacements == 0:
        nn.SyncBatchNorm.convert_sync_batchnorm = _watched  # type: ignore[method-assign]


def _watch() -> Any:
    """Return torch's conversion with a look at the model before it."""
    torchs: Any = vars(nn.SyncBatchNorm)["convert_sync_batchnorm"]

    @functools.wraps(torchs.__func__)
    def convert_sync_batchnorm(cls: Any, module: nn.Module, process_group: Any = None) -> Any:
        _look_at(module)
        return torchs.__func__(_Unwatched, module, process_group)

    class _Unwatched:  # torch's conversion calls itself for the children
        convert_sync_batchnorm = torchs

    return classmethod(convert_sync_batchnorm)


def _look_at(module: nn.Module) -> None:
    ours = [(path, m) for path, m in module.named_modules() if isinstance(m, Synchronised)]
    remedy = (
        "call syncbn.replace_torch_conversion() first, switch the trainer's own flag (sync_batchnorm) off, or convert "
        "syncbn.reverted(model)"
    )
    for path, m in ours:
        if m._activation is not None:
            raise ConversionError(
                f"torch's conversion would replace {path or 'this'}, a layer of syncbn, and lose its activation "
                f"{m._activation}: {remedy}"
            )
    if ours:
        log.warning("torch's conversion replaces %d layers of syncbn by nn.SyncBatchNorm: %s", len(ours), remedy)


_watched = nn.SyncBatchNorm.convert_sync_batchnorm = _watch()  # type: ignore[method-assign]
