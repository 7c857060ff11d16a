"""The output of a layer that waits: a tensor with shape, dtype and device, and no values until they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from .errors import InputError

UNSEEN = (
    "code that torch does not announce (an extension in C++, a weak reference, the arguments of a checkpoint): give "
    "that y.clone(), or end the block before"
)


class Batch(Protocol):
    """What computes tensors that wait."""

    def run(self) -> None:
        """Let each of them `become` what it stands for."""


class Pending(Tensor):
    """The output of a layer that waits, until it is needed."""

    _batch: Batch

    @classmethod
    def like(cls, x: Tensor, batch: Batch, *, requires_grad: bool) -> Pending:
        """Make one of the shape, dtype and device of `x`, which `batch` computes."""
        output: Pending = cls._make_wrapper_subclass(
            cls, x.size(), dtype=x.dtype, device=x.device, requires_grad=requires_grad
        )
        output._batch = batch
        return output

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        finish((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        raise InputError(f"{func} was called on a tensor that waits in syncbn.together(), by {UNSEEN}")

    def become(self, y: Tensor) -> None:
        """Turn this object into the tensor `y`; attributes that were set on it stay."""
        attributes = vars(self)
        del attributes["_batch"]
        vars(y).update(attributes)
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(self, y)  # type: ignore[no-untyped-call]


_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_sparse")
_METHODS = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "__len__",
    "get_device",
    "is_floating_point",
    "is_complex",
)
_KNOWN = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
        *(getattr(Tensor, name) for name in _METHODS),
        torch.is_floating_point,
        torch.is_complex,
    ]
)  # what needs no values


def finish(values: Iterable[object]) -> None:
    """Compute those of `values`, and within lists, tuples and dicts among them, that are tensors which wait."""
    for value in values:
        if type(value) is Pending:  # not any more, if one before waited for the same
            value._batch.run()
        elif isinstance(value, (list, tuple)):
            finish(value)
        elif isinstance(value, dict):
            finish(value.values())
