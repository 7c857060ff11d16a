"""`sync_batch_norm`: batch normalisation over the replicas of a process group, as a function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _composed, _fused
from . import kernels as _kernels
from ._statistics import Running, one_value, recomputing
from .comm._groups import ProcessGroup, resolve
from .errors import DTypeError, InputError
from .kernels import kernels_for

__all__ = ["sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup = None,
) -> Tensor:
    r"""Normalise each channel with the statistics of all replicas' inputs.

    In training, with sums over batch, space and all P replicas (they may hold different numbers of values, or none)::

        N = Σ n      μ = Σx / N      σ² = max(Σx²/N - μ², 0)
        y = weight · (x - μ) / √(σ² + eps) + bias
        running_mean ← (1 - momentum)·running_mean + momentum·μ
        running_var  ← (1 - momentum)·running_var  + momentum·σ²·N/(N-1)

    The gradient of `input` is that of the whole batch. Those of `weight` and `bias` are this replica's share: whatever
    reduces the gradients of the other parameters reduces these too.

    Otherwise it is `torch.nn.functional.batch_norm`, bit for bit: the running statistics, or this replica's own batch
    where there are none.

    Args:
        input: (N, C, *), any floating dtype; N, or a dimension of *, may be 0.
        running_mean: (C,), any floating dtype, or None. Updated in place in training, unless this forward is the
            recomputation of `torch.utils.checkpoint`.
        running_var: like `running_mean`.
        weight: (C,), any floating dtype, or None for 1.
        bias: (C,), any floating dtype, or None for 0.
        training: use the batch's statistics, and synchronise them.
        momentum: weight of the new value, 1 - decay; a tensor stays on its device.
        eps: added to the variance.
        process_group: the replicas: None or "world" for all, "node", int (replicas per group), a torch ProcessGroup,
            an mpi4py Comm, a horovod ProcessSet or a Communicator.

    Returns:
        (N, C, *) in dtype and memory format of `input`. Per-value arithmetic is float32, float64 for float64 input.

    Raises:
        InputError: wrong rank or channel count, or one value per channel in the whole world (a ValueError). The latter
            is seen on the CPU only; an accelerator would have to wait for the number, and gets y = bias instead.
        DTypeError: `input` is not floating (a TypeError).
        GroupError: `process_group` is unknown or does not hold this rank.
        CollectiveError: a peer is lost.

    Collectives: training issues one float64 all-reduce of 2C+1 numbers, its backward one of 2C if `input` needs a
    gradient, whatever the input holds; in a group of one replica, and otherwise, none.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1; over replicas: Peng et al. 2018, "MegDet", section
    3.3.

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = sync_batch_norm(x)
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-6)
        True
    """
    _check(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if not training:
        return _without_peers(input, running_mean, running_var, weight, bias, eps)
    comm = resolve(process_group)
    if comm.size == 1 and input.numel() == input.shape[1]:  # known without asking the device
        raise one_value()
    running = None if recomputing() else Running(running_mean, running_var, None, momentum)
    kernels = kernels_for(input, running_mean, running_var, weight, bias)
    if kernels is _kernels._composed:
        return _composed.sync_batch_norm(input, weight, bias, eps, comm, running)
    return _fused.sync_batch_norm(input, weight, bias, eps, comm, running, kernels)


def _check(input: Tensor, **per_channel: Tensor | None) -> None:
    """Refuse, before any collective, what no replica can normalise."""
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]  # a check of shapes would be baked in
        return
    if input.dim() < 2:
        raise InputError(f"expected 2D or more input, got {input.dim()}D of shape {tuple(input.shape)}: pass (N, C, *)")
    if not input.is_floating_point():
        raise DTypeError(f"expected floating-point input, got {input.dtype}: convert it, e.g. input.float()")
    channels = input.shape[1]
    if channels == 0:
        raise InputError(f"expected at least 1 channel, got input of shape {tuple(input.shape)}")
    for name, tensor in per_channel.items():
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise InputError(
                f"expected {name} of shape ({channels},) for input of shape {tuple(input.shape)}, "
                f"got {tuple(tensor.shape)}: the input's axis 1 must be the layer's channels"
            )
        if not tensor.is_floating_point():
            raise DTypeError(f"expected floating-point {name}, got {tensor.dtype}")


def _without_peers(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Eval: torch's own kernel, after the conversions that it asks for but does not make."""
    per_channel = [running_mean, running_var, weight, bias]
    dtypes = {tensor.dtype for tensor in per_channel if tensor is not None}
    mixed = input.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}  # torch's one allowed mixture
    if dtypes - {input.dtype} and not mixed:
        dtype = _composed.compute_dtype(input)
        per_channel = [None if tensor is None else tensor.to(dtype) for tensor in per_channel]
    running_mean, running_var, weight, bias = per_channel
    batch_statistics = running_mean is None or running_var is None
    return F.batch_norm(input, running_mean, running_var, weight, bias, batch_statistics, 0.0, eps)
