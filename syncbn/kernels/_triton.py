"""Triton kernels for CUDA (and ROCm and XPU). Implements `Kernels`, in one launch a call.

Not yet run on a GPU: tested in Triton's interpreter, on the CPU, and compiled for sm_80, sm_90 and gfx942. Does not
import Triton before a tensor or SYNCBN_KERNELS asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._epilogue import Epilogue
from .._plain import are_plain
from .._statistics import Running, refuse_total

log = logging.getLogger("syncbn")

TILE = 2048  # values
_IDENTITY = (None, 0.0)  # in an activation's place
_COLUMNS = (4, 16, 64, 256, 1024)  # of a tile: few widths, as each is a compilation
_ROW_COLUMNS = _COLUMNS[:3]
_PROGRAMS = 1024  # enough to fill a large GPU. Not its size, on which then the bits would depend
_TILES = 64  # that a program adds up in float32 before float64 takes over


def takes(*tensors: Tensor | None) -> bool:
    """Take plain tensors on one GPU that Triton works on; and on the CPU in the interpreter, where it was asked for."""
    device = next((t.device for t in tensors if t is not None), None)
    return device is not None and _serves(device) and are_plain(tensors, device.type)


def moments(x: Tensor) -> Tensor:
    """Return `[Σx, Σx², n]`."""
    length = 2 * x.shape[1] + 1
    if x.numel() == 0:
        return x.new_zeros(length, dtype=torch.float64)
    x, work = _dense(x)
    payload = x.new_empty(length, dtype=torch.float64)
    with _on_device_of(x):
        _code().moments[(work.blocks * work.splits,)](
            x, _partial(x, work), _tickets(x, work), payload, *work.sizes, work.splits, **work.tile
        )
    return payload


def normalize(
    x: Tensor, total: Tensor, epilogue: Epilogue, eps: float, running: Running | None
) -> tuple[Tensor, Tensor]:
    """Return y and `[mean, 1/√(σ²+ε), N]`; move the running statistics."""
    refuse_total(total)
    x, work = _dense(x)
    y, statistics = torch.empty_like(x), x.new_empty(total.shape, dtype=torch.float64)
    activation, slope = epilogue.activation or _IDENTITY
    mean, var, batches, momentum = running or Running(None, None)
    average = momentum is None and batches is not None
    if momentum is None and not average:  # no count: no average
        mean = var = None
    momentum_at = None
    if isinstance(momentum, Tensor):  # one on the device stays there; one on the CPU is free to read
        momentum, momentum_at = (None, momentum) if momentum.device == x.device else (momentum.item(), None)
    moved = [t for t in (mean, var, batches) if t is not None]
    if moved:  # as every in-place operation does
        torch.autograd.graph.increment_version(moved)
    with _on_device_of(x):
        _code().normalize[(1 + work.blocks * work.splits,)](
            x, y, _like(epilogue.residual, x), total.contiguous(), _packed(epilogue.weight), _packed(epilogue.bias),
            statistics, mean, var, batches, momentum_at, float(slope), float(momentum or 0), eps,
            0 if mean is None else mean.stride(0), 0 if var is None else var.stride(0), *work.sizes,
            activation=activation, average=average, **work.tile,
        )  # fmt: skip
    return y, statistics


def backward_sums(dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor | None]:
    """Return `[Σdz, Σdz·x̂]`, and dz if there are a residual and an activation."""
    if epilogue.activation is None:
        epilogue = Epilogue()  # nobody asks for z
    x, work = _dense(x)
    activation, slope = epilogue.activation or _IDENTITY
    dz = None if epilogue.residual is None else torch.empty_like(x)
    length = 2 * x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(length, dtype=torch.float64), dz
    payload = x.new_empty(length, dtype=torch.float64)
    with _on_device_of(x):
        _code().backward_sums[(work.blocks * work.splits,)](
            _like(dy, x), x, _like(epilogue.residual, x), dz, statistics.contiguous(), _packed(epilogue.weight),
            _packed(epilogue.bias), _partial(x, work), _tickets(x, work), payload, float(slope), *work.sizes,
            work.splits, activation=activation, **work.tile,
        )  # fmt: skip
    return payload, dz


def backward_input(dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue, sums: Tensor) -> Tensor:
    """Return weight/√(σ²+ε)·(dz - T1/N - x̂·T2/N)."""
    x, work = _dense(x)
    dx = torch.empty_like(x)
    activation, slope = epilogue.activation or _IDENTITY
    bias = None if epilogue.activation is None else epilogue.bias
    if x.numel():
        with _on_device_of(x):
            _code().backward_input[(work.blocks * work.splits,)](
                _like(dy, x), x, dx, statistics.contiguous(), _packed(epilogue.weight), _packed(bias),
                sums.contiguous(), float(slope), *work.sizes, activation=activation, **work.tile,
            )  # fmt: skip
    return dx


class Work(NamedTuple):
    """How a tensor is divided among programs: each of `blocks` of channels among `splits`."""

    blocks: int
    splits: int
    sizes: tuple[int, int, int, int]  # outer, inner, channels, and the tiles of a program
    tile: dict[str, Any]  # what is compiled in: rows or planes, and a tile's lines and columns


@functools.lru_cache(maxsize=4096)
def divide(shape: torch.Size, rows: bool) -> Work:
    """Divide a tensor (N, C, *), dense with the channels innermost if `rows`, else second."""
    samples, channels, inner = shape[0], shape[1], shape[2:].numel()
    outer, inner = (samples * inner, 1) if rows else (samples, inner)
    widths, across = (_ROW_COLUMNS, channels) if rows else (_COLUMNS, inner)
    columns = next((width for width in widths if width >= across), widths[-1])
    lines = TILE // columns
    blocks = _ceil(channels, columns) if rows else channels
    tiles = _ceil(outer, lines) * (1 if rows else _ceil(inner, columns))
    per = min(max(_ceil(blocks * tiles, _PROGRAMS), 1), _TILES)
    return Work(
        blocks,
        _ceil(tiles, per),
        (outer, inner, channels, per),
        {"rows": rows, "lines": lines, "columns": columns, **options("cuda" if torch.version.cuda else "")},
    )


def options(backend: str) -> dict[str, int]:
    """Return what Triton's compiler is told: 256 threads a program, on NVIDIA with as many registers as they need.

    Left alone, ptxas spills a few for the sake of one program more at a time.
    """
    return {"num_warps": 8, "maxnreg": 255} if backend == "cuda" else {"num_warps": 4}


def _ceil(values: int, size: int) -> int:
    return -(-values // size)


def problem() -> str:
    """Say why Triton cannot be had, or nothing."""
    try:
        _code()
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    return ""


@functools.cache
def _code() -> Any:
    from . import _triton_code

    return _triton_code


@functools.cache
def _serves(device: torch.device) -> bool:
    """Tell whether Triton is there and works on this device; a log record says why not, once."""
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("SYNCBN_KERNELS") == "triton"
    if device.type not in ("cuda", "xpu"):
        return False
    reason = problem()
    if not reason:
        try:
            reason = _unfit(device)
        except Exception as error:  # the launcher is compiled here: no C compiler, no driver
            reason = f"triton does not work here ({error})"
    if reason:
        log.warning("no Triton kernels on %s, but PyTorch's own, in more launches: %s", device, reason)
    return not reason


def _unfit(device: torch.device) -> str:
    """Say why this GPU is none for the kernels, or nothing. Raises what Triton raises where it cannot work."""
    import triton

    triton.runtime.driver.active.get_current_target()
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "they are compiled for compute capability 8.0 and later"
    return ""


def _dense(x: Tensor) -> tuple[Tensor, Work]:
    """Return `x`, copied unless its memory is dense already with the channels second or innermost, and its division."""
    if x.is_contiguous():
        return x, divide(x.shape, x.shape[2:].numel() == 1)
    innermost = x.movedim(1, -1)
    if innermost.is_contiguous():
        return x, divide(x.shape, True)
    if x.stride(1) == 1:
        return innermost.contiguous().movedim(-1, 1), divide(x.shape, True)
    return _dense(x.contiguous())


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a tensor in the memory layout of the dense `x`."""
    return tensor if tensor is None or tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


def _packed(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _partial(x: Tensor, work: Work) -> Tensor:
    """Return room for each program's two sums, float64."""
    return x.new_empty(2 * work.splits * x.shape[1], dtype=torch.float64)


_kept: dict[tuple[int, int], Tensor] = {}  # (device, stream) -> tickets, all 0 between two kernels of that stream


def _tickets(x: Tensor, work: Work) -> Tensor:
    """Return a counter for each block of channels, int32, that is 0 when the kernel begins; the kernel leaves it so.

    Kernels that may run at the same time share none: those of other streams, and those of a CUDA graph, which another
    stream may replay.
    """
    if x.device.type == "cpu":
        key = (-1, 0)
    else:
        device: Any = getattr(torch, x.device.type)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return x.new_zeros(work.blocks, dtype=torch.int32)
        key = (x.device.index, device.current_stream(x.device).stream_id)
    tickets = _kept.get(key)
    if tickets is None or tickets.numel() < work.blocks:
        tickets = _kept[key] = x.new_zeros(max(work.blocks, 4096), dtype=torch.int32)
    return tickets


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of `x` the current one, on which Triton launches."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    device: Any = getattr(torch, x.device.type)
    return device.device(x.device)  # type: ignore[no-any-return]
