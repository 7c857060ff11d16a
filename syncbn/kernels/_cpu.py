"""The compiled CPU kernels. Implements `Kernels`: makes room for the results; `syncbn._native` checks and computes."""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from .. import _native
from .._plain import not_wrapped
from .._statistics import Running, one_value


def takes(*tensors: Tensor | None) -> bool:
    """Take plain tensors on the CPU."""
    return _native.are_plain(tensors) and not_wrapped(tensors)


def moments(x: Tensor) -> Tensor:
    """Return `[Σx, Σx², n]`."""
    payload = x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)
    _native.moments(get_num_threads(), _dense(x), payload)
    return payload


def normalize(
    x: Tensor, total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running | None
) -> tuple[Tensor, Tensor]:
    """Return y and `[mean, 1/√(σ²+ε), N]`; move the running statistics."""
    x = _dense(x)
    y, statistics = torch.empty_like(x), torch.empty_like(total)
    if running is not None:  # as every in-place operation does
        torch.autograd.graph.increment_version([t for t in running[:3] if t is not None])
    if _native.normalize(get_num_threads(), x, y, total, statistics, weight, bias, eps, running) == 1:
        raise one_value()
    return y, statistics


def backward_sums(dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """Return `[Σdy, Σdy·x̂]`."""
    x = _dense(x)
    payload = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    _native.backward_sums(get_num_threads(), _like(dy, x), x, statistics, payload)
    return payload


def backward_input(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
    """Return weight/√(σ²+ε)·(dy - T1/N - x̂·T2/N)."""
    x = _dense(x)
    dx = torch.empty_like(x)
    _native.backward_input(get_num_threads(), _like(dy, x), x, dx, statistics, weight, sums)
    return dx


def _dense(x: Tensor) -> Tensor:
    """Return `x`, copied unless its memory is dense already with the channels second or innermost."""
    if x.is_contiguous() or _native.is_dense(x):
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dy` in the memory layout of the dense `x`."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
