"""PyTorch's own batch_norm_* CUDA kernels behind the `Kernels` protocol.

The operations that torch.nn.SyncBatchNorm is made of, without its all-gather, boolean mask and host synchronisation.
Not yet run on a GPU: tested on the CPU through emulated operations that check every argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def moments(x: Tensor) -> Tensor:
    """Return `[Σx, Σx², n]` from the kernel's Welford mean and 1/σ."""
    if x.numel() == 0:  # a shape, known to the host; the kernel refuses empty tensors
        return torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    mean, invstd = (t.double() for t in torch.batch_norm_stats(_dense(x), 0.0))
    # With eps = 0 the kernel writes 0 for 1/0. NaN stays NaN.
    variance = torch.where(invstd == 0, 0.0, invstd.square().reciprocal())
    n = x.numel() // x.shape[1]
    return torch.cat([n * mean, n * (variance + mean.square()), torch.full_like(mean[:1], n)])


def normalize(x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·(x - mean)/√(σ²+ε) + bias."""
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = _per_channel_dtype(x)
    mean, invstd, _ = _parts(statistics.to(dtype))
    return torch.batch_norm_elemt(_dense(x), _to(weight, dtype), _to(bias, dtype), mean, invstd, 0.0)


def backward_sums(dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """Return `[Σdy, Σdy·x̂]`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.shape[1], dtype=torch.float64, device=x.device)
    mean, invstd, _ = _parts(statistics.to(_per_channel_dtype(x)))
    x = _dense(x)
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(_like(dy, x), x, mean, invstd, None, True, False, False)
    return torch.cat([sum_dy.double(), sum_dy_xmu.double() * _parts(statistics)[1]])


def backward_input(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
    """Return weight/√(σ²+ε)·(dy - T1/N - x̂·T2/N)."""
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = _per_channel_dtype(x)
    mean, invstd, _ = _parts(statistics.to(dtype))
    x = _dense(x)
    sum_dy, sum_dy_xhat = sums.chunk(2)
    _, exact_invstd, count = _parts(statistics)
    # The kernel sums a list of int32 counts: the one entry is N, known to the device alone.
    return torch.batch_norm_backward_elemt(
        _like(dy, x), x, mean, invstd, _to(weight, dtype),
        sum_dy.to(dtype), (sum_dy_xhat / exact_invstd).to(dtype), count.to(torch.int32),
    )  # fmt: skip


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
