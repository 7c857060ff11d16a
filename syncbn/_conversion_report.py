"""What a conversion does with each norm layer of a model, and why: known before anything changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._layer import Synchronised
from ._synchronised_class import class_for
from .errors import ConversionError

Skip: TypeAlias = "str | type[nn.Module] | Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]"


@dataclass(frozen=True)
class ConversionReport:
    """Every norm layer of a model by its dotted path ("" is the model itself), with a class or a reason.

    Attributes:
        converted: what is synchronised: the name of its original class.
        skipped: left as it is because the caller wants it so, or since it is synchronised already; the latter takes the
            process group, if one is given.
        refused: cannot be converted without changing what it computes; as long as there is one, nothing is converted.
        left: no nn.BatchNorm, but it looks like one, or it holds one that it does not always run.
    """

    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        groups = {name: getattr(self, name) for name in ("converted", "skipped", "refused", "left")}
        counts = ", ".join(f"{len(group)} {name}" for name, group in groups.items())
        lines = [
            f"  {name} {path or 'the model'}: {text}" for name, group in groups.items() for path, text in group.items()
        ]
        return "\n".join([f"norm layers: {counts}", *lines])


def plan(model: nn.Module, skip: Skip) -> tuple[list[tuple[Any, Any]], list[Any], ConversionReport]:
    """Return the layers that are to be converted, each with its new class, those that are ours, and the report.

    Raises:
        ConversionError: `skip` names what is not in the model.
    """
    report = ConversionReport()
    skipped = _skipped(model, skip)
    pairs, ours = [], []
    for path, module in model.named_modules():
        kind = type(module).__qualname__
        if module in skipped:
            if isinstance(module, _BatchNorm):
                report.skipped[path] = skipped[module]
        elif _WRAPPERS & {base.__name__ for base in type(module).__mro__}:
            report.refused[path] = f"{kind} has taken the parameters apart: convert the model first, then wrap it"
        elif isinstance(module, Synchronised):
            report.skipped[path] = "synchronised already"
            ours.append(module)
        elif isinstance(module, _BatchNorm):
            try:
                pairs.append((module, class_for(module)))
            except ConversionError as error:
                report.refused[path] = f"{type(module).__module__}.{kind}: {error}"
            else:
                report.converted[path] = kind
        elif reason := _reason_left(module):
            report.left[path] = reason
    return pairs, ours, report


_WRAPPERS = {"FullyShardedDataParallel", "FSDPModule"}


def _skipped(model: nn.Module, skip: Skip) -> dict[nn.Module, str]:
    """Return the modules that `skip` means, and all within them, each with the reason."""
    found: dict[nn.Module, str] = {}
    for rule in list(skip) if isinstance(skip, Iterable) and not isinstance(skip, (str, type)) else [skip]:
        matches = [
            module for path, module in model.named_modules(remove_duplicate=False) if _matches(rule, path, module)
        ]
        if not matches and isinstance(rule, str):
            raise ConversionError(f"skip={rule!r} is the path of no module: see model.named_modules()")
        text = f"skip={rule.__qualname__ if hasattr(rule, '__qualname__') else rule!r}"
        for match in matches:
            found.update(dict.fromkeys(match.modules(), text))
    return found


def _matches(rule: Any, path: str, module: nn.Module) -> bool:
    if isinstance(rule, str):
        return path == rule
    if isinstance(rule, type):
        return isinstance(module, rule)
    if callable(rule):
        return bool(rule(path, module))
    raise ConversionError(f"skip={rule!r}: expected the path of a module, a class, or a function of path and module")


_LOOKS_LIKE_ONE = re.compile(r"batch_?norm|sync_?bn|frozen_?bn|inplaceabn", re.IGNORECASE)


def _reason_left(module: nn.Module) -> str:
    """Say why this module, which is no nn.BatchNorm, is left although it looks like one; "" if it does not."""
    kind = type(module).__qualname__
    inside = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        if _LOOKS_LIKE_ONE.search(original):
            return f"{original} was compiled by torch.jit.script: convert the model before that"
    elif inside:
        if getattr(module, "allow_single_element", False):
            return (
                f"{kind} does not run its norm layer where it gets a single element, and the other replicas would wait "
                "for it: make it with allow_single_element=False"
            )
    elif _LOOKS_LIKE_ONE.search(kind):
        return f"{kind} is no nn.BatchNorm*, and normalises by itself"
    return ""
