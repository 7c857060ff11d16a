"""The compiled CPU kernels: tensors checked and handed to `syncbn._native` as addresses. Implements `Kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..errors import DTypeError, InputError

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/loops.h
DTYPES = frozenset(_CODES)

_Layout = tuple[int, int, int]


def moments(x: Tensor) -> Tensor:
    """Return `[Σx, Σx², n]`."""
    x, layout = _dense(x)
    sums = torch.empty(2 * layout[1] + 1, dtype=torch.float64)
    _native.moments(*_common(x, layout), x.data_ptr(), sums.data_ptr())
    return sums


def normalize(x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·(x - mean)/√(σ²+ε) + bias."""
    x, layout = _dense(x)
    channels = layout[1]
    statistics = _float64("statistics", statistics, 2 * channels + 1)
    weight, bias = _parameter("weight", weight, channels), _parameter("bias", bias, channels)
    y = torch.empty_like(x)
    _native.normalize(
        *_common(x, layout), x.data_ptr(), y.data_ptr(), statistics.data_ptr(), *_address(weight), *_address(bias)
    )
    return y


def backward_sums(dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """Return `[Σdy, Σdy·x̂]`."""
    x, layout = _dense(x)
    dy, channels = _like(dy, x, layout), layout[1]
    statistics = _float64("statistics", statistics, 2 * channels + 1)
    sums = torch.empty(2 * channels, dtype=torch.float64)
    _native.backward_sums(*_common(x, layout), dy.data_ptr(), x.data_ptr(), statistics.data_ptr(), sums.data_ptr())
    return sums


def backward_input(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
    """Return weight/√(σ²+ε)·(dy - T1/N - x̂·T2/N)."""
    x, layout = _dense(x)
    dy, channels = _like(dy, x, layout), layout[1]
    statistics, sums = _float64("statistics", statistics, 2 * channels + 1), _float64("sums", sums, 2 * channels)
    weight = _parameter("weight", weight, channels)
    dx = torch.empty_like(x)
    _native.backward_input(
        *_common(x, layout), dy.data_ptr(), x.data_ptr(), dx.data_ptr(),
        statistics.data_ptr(), *_address(weight), sums.data_ptr(),
    )  # fmt: skip
    return dx


def _common(x: Tensor, layout: _Layout) -> tuple[int, int, int, int, int]:
    return (_CODES[x.dtype], torch.get_num_threads(), *layout)


def _dense(x: Tensor) -> tuple[Tensor, _Layout]:
    """Return `x`, copied unless its memory is dense already, and how its memory reads."""
    if x.dtype not in _CODES:
        raise DTypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    _check_memory("x", x)
    if x.dim() < 2:
        raise InputError(f"x: expected 2D or more, (N, C, *), got {tuple(x.shape)}")
    layout = _layout(x)
    if layout is None:
        innermost = x.stride(1) == 1
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x.contiguous()
        layout = _layout(x)
        assert layout is not None
    return x, layout


def _layout(x: Tensor) -> _Layout | None:
    """Return how dense memory reads: planes (N, C, S), or rows (N·S, C, 1) if channels are innermost; else None."""
    n, c, *_ = x.shape
    if x.is_contiguous():
        return n, c, x.numel() // max(n * c, 1)
    if x.movedim(1, -1).is_contiguous():
        return x.numel() // max(c, 1), c, 1
    return None


def _like(dy: Tensor, x: Tensor, layout: _Layout) -> Tensor:
    """Return `dy` in the memory layout of the dense `x`."""
    if dy.dtype != x.dtype:
        raise DTypeError(f"dy: expected the dtype of x, {x.dtype}, got {dy.dtype}")
    _check_memory("dy", dy)
    if dy.shape != x.shape:
        raise InputError(f"dy: expected the shape of x, {tuple(x.shape)}, got {tuple(dy.shape)}")
    same = dy.stride() == x.stride() or _layout(dy) == layout
    return dy if same else torch.empty_like(x).copy_(dy)


def _float64(name: str, values: Tensor, length: int) -> Tensor:
    if values.dtype != torch.float64:
        raise DTypeError(f"{name}: expected float64, got {values.dtype}")
    return _vector(name, values, length)


def _parameter(name: str, values: Tensor | None, length: int) -> Tensor | None:
    """Return `values` as float32 or float64."""
    if values is None:
        return None
    if not values.is_floating_point():
        raise DTypeError(f"{name}: expected a floating dtype, got {values.dtype}")
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    return _vector(name, values, length)


def _vector(name: str, values: Tensor, length: int) -> Tensor:
    _check_memory(name, values)
    if values.shape != (length,):
        raise InputError(f"{name}: expected shape ({length},), got {tuple(values.shape)}")
    return values.contiguous()


def _check_memory(name: str, values: Tensor) -> None:
    if not values.is_cpu or values.layout is not torch.strided:
        raise InputError(f"{name}: expected a strided tensor on the CPU, got {values.layout} on {values.device}")


def _address(parameter: Tensor | None) -> tuple[int, int]:
    """Return address and dtype code; 0 for None. The caller keeps the tensor alive."""
    return (0, 0) if parameter is None else (parameter.data_ptr(), _CODES[parameter.dtype])
