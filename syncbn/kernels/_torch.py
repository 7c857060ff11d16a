"""PyTorch's own batch_norm_* CUDA operations. Implements `Kernels`.

The operations that torch.nn.SyncBatchNorm is made of, without its all-gather, boolean mask and host synchronisation.
Not yet run on a GPU: tested on the CPU through emulated operations that check every argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._epilogue import Epilogue
from .._plain import are_plain
from .._statistics import Running, update_running
from .._statistics import statistics as statistics_of


def takes(*tensors: Tensor | None) -> bool:
    """Take plain CUDA tensors."""
    return are_plain(tensors, "cuda")


def moments(x: Tensor) -> Tensor:
    """Return `[Σx, Σx², n]` from the kernel's Welford mean and 1/σ."""
    n = x.numel() // max(x.shape[1], 1)
    payload = x.new_full((2 * x.shape[1] + 1,), n, dtype=torch.float64)
    mean, squares = sums = payload[:-1].view(2, -1)
    if n == 0:  # a shape, known to the host; the kernel refuses empty tensors
        return payload
    sums.copy_(torch.stack(torch.batch_norm_stats(_dense(x), 0.0)))
    # Σx²/n = σ² + mean². With eps = 0 the kernel writes 0 for 1/0; NaN stays NaN.
    squares.pow_(-2).nan_to_num_(nan=torch.nan, posinf=0.0).addcmul_(mean, mean)
    sums.mul_(n)
    return payload


def normalize(
    x: Tensor, total: Tensor, epilogue: Epilogue, eps: float, running: Running | None
) -> tuple[Tensor, Tensor]:
    """Return y and `[mean, 1/√(σ²+ε), N]`; move the running statistics."""
    statistics = statistics_of(total, eps)
    if running is not None:
        update_running(running, total)
    if x.numel() == 0:
        return torch.empty_like(x), statistics
    return epilogue.finish(_affine(_dense(x), statistics, epilogue)), statistics


def backward_sums(dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor | None]:
    """Return `[Σdz, Σdz·x̂]`, and dz if there is an activation."""
    activation = epilogue.activation
    if x.numel() == 0:
        sums = x.new_zeros(2 * x.shape[1], dtype=torch.float64)
        return sums, None if activation is None else torch.empty_like(x)
    mean, invstd, _ = _parts(statistics.to(_per_channel_dtype(x)))
    x = _dense(x)
    dz = _like(dy, x)
    if activation is not None:
        dz = epilogue.gradient(dz, _affine(x, statistics, epilogue))
    sum_dz, sum_dz_xmu, _, _ = torch.batch_norm_backward_reduce(dz, x, mean, invstd, None, True, False, False)
    sums = torch.cat([sum_dz.double(), sum_dz_xmu * _parts(statistics)[1]])
    return sums, None if activation is None else dz


def backward_input(dy: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue, sums: Tensor) -> Tensor:
    """Return weight/√(σ²+ε)·(dy - T1/N - x̂·T2/N)."""
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = _per_channel_dtype(x)
    mean, invstd, _ = _parts(statistics.to(dtype))
    x = _dense(x)
    _, exact_invstd, count = _parts(statistics)
    sum_dy, sum_dy_xhat = (sums / count).chunk(2)
    # The kernel divides by a sum of int32 counts, which would not hold N beyond 2³¹: it gets shares, and a 1.
    return torch.batch_norm_backward_elemt(
        _like(dy, x), x, mean, invstd, _to(epilogue.weight, dtype), sum_dy.to(dtype),
        (sum_dy_xhat / exact_invstd).to(dtype), torch.ones(1, dtype=torch.int32, device=x.device),
    )  # fmt: skip


def _affine(x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
    """Return weight·x̂ + bias."""
    dtype = _per_channel_dtype(x)
    mean, invstd, _ = _parts(statistics.to(dtype))
    return torch.batch_norm_elemt(x, _to(epilogue.weight, dtype), _to(epilogue.bias, dtype), mean, invstd, 0.0)


def _parts(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, 1/√(σ²+ε) and N, (1,)."""
    channels = statistics.numel() // 2
    mean, invstd, count = statistics.tensor_split([channels, 2 * channels])
    return mean, invstd, count


def _per_channel_dtype(x: Tensor) -> torch.dtype:
    """Return what the kernels accumulate in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _dense(x: Tensor) -> Tensor:
    """Return `x` in one of the layouts that the kernels know: channels_last, channels_last_3d or contiguous."""
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def _like(dy: Tensor, x: Tensor) -> Tensor:
    return dy.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
