"""Which tensors are no more than their device, dtype, sizes and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as transforms_are_active
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped

FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

TYPES = frozenset({Tensor, nn.Parameter, nn.Buffer})
_DTYPES = FLOATING | {torch.int64}  # num_batches_tracked


def are_plain(tensors: Sequence[Tensor | None], device: str) -> bool:
    """Tell whether each tensor is what its memory on a `device`, "cpu" or "cuda", says: code may work on its address.

    No subclass (DTensor, fake tensor), layout other than strides, negative or conjugate view (those are complex), other
    dtype than int64 and the usual floating ones, nor a tensor that a torch.func transform has wrapped.
    """
    is_there = f"is_{device}"
    for t in tensors:
        if t is not None and (
            type(t) not in TYPES
            or not getattr(t, is_there)
            or t.dtype not in _DTYPES
            or t.layout is not torch.strided
            or t.is_neg()
        ):
            return False
    return not_wrapped(tensors)


def not_wrapped(tensors: Sequence[Tensor | None]) -> bool:
    """Tell whether no transform of torch.func has wrapped one of them."""
    return not transforms_are_active() or not any(t is not None and is_wrapped(t) for t in tensors)
