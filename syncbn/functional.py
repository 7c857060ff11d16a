"""`sync_batch_norm`: batch normalisation over the replicas of a process group, as a function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _autograd, _block, _operators
from ._checks import check, is_traced, refuse_transforms
from ._dtensor import group_of, locally
from ._epilogue import ActivationLike, Epilogue, activation_of, tensors_of
from ._statistics import Running
from .comm._groups import ProcessGroup, alone, communicator, key_of

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
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Normalise each channel with the statistics of all replicas' inputs.

    In training, with sums over batch, space and all P replicas (they may hold different numbers of values, or none)::

        N = Σ n      μ = Σx / N      σ² = max(Σx²/N - μ², 0)
        y = activation(weight · (x - μ) / √(σ² + eps) + bias + residual)
        running_mean ← (1 - momentum)·running_mean + momentum·μ
        running_var  ← (1 - momentum)·running_var  + momentum·σ²·N/(N-1)

    The sums are float64, whatever the dtypes, about zero: σ² has a relative error of about 2⁻⁵³·(1 + (μ/σ)²), however
    the batch is split: 1e-14 where the mean is ten standard deviations from zero, 1e-8 at 10⁴, 1e-4 at 10⁶.

    The gradient of `input` is that of the whole batch. Those of `weight` and `bias` are this replica's share: whatever
    reduces the gradients of the other parameters reduces these too.

    Addition and activation cost no pass over memory, and nothing is kept for them but `bias` and `residual`: backward
    computes what the activation was given from `input`, which is kept anyway. Any sign of `weight` will do.

    With a mask, each position of the batch has a weight w, 1 or 0 where it is bool, and the sums are those of what is
    valid, over all replicas, however it is divided among them: an integer weight is that value so many times::

        N = Σ w      μ = Σ w·x / N      σ² = max(Σ w·x²/N - μ², 0)
        dx = weight / √(σ² + eps) · (dz - w·(Σ dz + x̂·Σ dz·x̂) / N)

    dz is the gradient of the activation's argument, x̂ = (x - μ) / √(σ² + eps). All positions are normalised with
    these statistics, so all of them add to the sums of the gradient; what is outside (w = 0) has no part in the
    statistics and so no such term. It may be anything: NaN and infinity there stay there, also in the backward of a
    loss that does not use them. Replicas without a mask have w = 1. Where nothing is valid on any replica, y =
    activation(bias + residual), the gradient is 0, and the running statistics stay; for N < 2 they take σ²·N.

    Otherwise it is `torch.nn.functional.batch_norm`, bit for bit: the running statistics, or this replica's own batch
    where there are none; then the addition and the activation. There the mask counts where the batch's statistics do.

    Args:
        input: `(N, C, *)`, any floating dtype; N, or a dimension of `*`, may be 0. A DTensor sharded over N or `*` is
            summed over the dimensions of its mesh that shard it, which hold the replicas; parameters and buffers are
            ordinary tensors or replicated over that mesh, a residual is placed as it is.
        running_mean: (C,), any floating dtype, or None. Updated in place in training, but not by a forward that repeats
            an earlier one inside a backward (activation checkpointing).
        running_var: like `running_mean`.
        weight: (C,), any floating dtype, or None for 1.
        bias: (C,), any floating dtype, or None for 0.
        training: use the batch's statistics, and synchronise them. True unless told otherwise, other than for
            `F.batch_norm`: who calls this function by name wants that.
        momentum: weight of the new value, 1 - decay; a tensor stays on its device.
        eps: added to the variance.
        process_group: the replicas: None or "world" for all, "node", int (replicas per group), a torch ProcessGroup or
            DeviceMesh of one dimension, an mpi4py Comm, a horovod ProcessSet or a Communicator.
        activation: "relu", "leaky_relu" (slope 0.01), "silu" or "hardswish", or the torch.nn module that is one of
            these, as nn.LeakyReLU(0.1); each as torch defines it.
        residual: added before the activation: shape, dtype and device of `input`, any memory format.
        mask: `(N, 1, *)` or `(N, *)`, bool, True where a value is valid, or floating weights that are finite and not
            negative; on the device of `input`, constants. See `syncbn.valid_positions` for padded batches.

    Returns:
        `(N, C, *)` in dtype and memory format of `input`. Per-value arithmetic is float32, float64 for float64 input.

    Raises:
        InputError: wrong rank, channel count, device, activation, shape of the residual or the mask, or one value per
            channel (0 < N <= 1) in the whole world (a ValueError). The latter is seen on the CPU only; an accelerator
            would have to wait for the number, and gets y = bias instead. Likewise weights that are negative, infinite
            or NaN, on whichever replica: an error on every one, and NaN on an accelerator. Also torch.func.vmap and
            jvp, and `is_grads_batched=True`. An input DTensor of partial sums or with sharded channels, or tensors that
            are not placed as it needs them.
        DTypeError: a tensor is not floating (the mask: nor bool), or holds its values elsewhere (a DTensor beside an
            ordinary input, or the like), or the residual has another dtype (a TypeError).
        GroupError: `process_group` is unknown or does not hold this rank, or is given beside a DTensor.
        CollectiveError: a peer is lost.

    Collectives: training issues one float64 all-reduce of 2C+1 numbers, its backward one of 2C if `input` needs a
    gradient, whatever the input holds and whether compiled or not; in a group of one replica, and otherwise, none.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", algorithm 1; over replicas: Peng et al. 2018, "MegDet", section
    3.3. The mask is what pytorch#30414 and #70529 ask for. Elsewhere, Keras' layer does not synchronise where it has a
    mask (`_moments` in its batch_normalization.py), and Flax's averages the replicas' means as if each had as many
    values (`_compute_stats` in its linen/normalization.py).

    Example:
        >>> import torch
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = sync_batch_norm(x)
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-6)
        True
        >>> short = torch.arange(4) < 3  # the last column is padding
        >>> y = sync_batch_norm(x, mask=short.expand(8, 4, 4))
        >>> torch.allclose(y[..., :3], sync_batch_norm(x[..., :3]), atol=1e-6)
        True
    """
    epilogue = Epilogue(weight, bias, residual, activation_of(activation))
    if not training:
        return evaluate(input, epilogue, running_mean, running_var, eps, mask)
    return train(input, epilogue, Running(running_mean, running_var, None, momentum), eps, key_of(process_group), mask)


def train(
    input: Tensor,
    epilogue: Epilogue,
    running: Running,
    eps: float,
    group: str,
    mask: Tensor | None = None,
    name: str | Tensor = "",
) -> Tensor:
    """Normalise with the statistics of all replicas of the group whose key is `group`; move the `running` ones.

    `name` is that of the layer, in compiled code its number: see `_names.Name`.
    """
    tensors = (input, *tensors_of(epilogue), mask)
    if has_torch_function(tensors):  # subclasses and modes decide, as for a function of torch's own
        return handle_torch_function(train, tensors, input, epilogue, running, eps, group, mask, name)
    if _block.blocks:
        _block.settle(running.mean)
    if type(input) is DTensor:
        group = group_of(input, group)
        return locally(
            lambda x, parts, of, mask: train(x, parts, of, eps, group, mask, name), input, epilogue, running, mask
        )
    check(input, epilogue, running.mean, running.var, mask)
    if is_traced(input):
        return _operators.sync_batch_norm(input, epilogue, running, eps, group, mask, name)
    refuse_transforms(input)
    assert isinstance(name, str)
    return _autograd.sync_batch_norm(input, epilogue, running, eps, communicator(group), mask, name)


def evaluate(
    input: Tensor,
    epilogue: Epilogue,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Use torch's own kernel, after the conversions that it asks for but does not make."""
    if _block.blocks:
        _block.settle(running_mean, input, epilogue.residual, mask)
    if type(input) is DTensor:
        running = Running(running_mean, running_var)
        return locally(
            lambda x, parts, of, mask: evaluate(x, parts, of.mean, of.var, eps, mask), input, epilogue, running, mask
        )
    check(input, epilogue, running_mean, running_var, mask)
    batch_statistics = running_mean is None or running_var is None
    if batch_statistics and mask is not None:  # which torch's kernel does not know
        return train(input, epilogue, Running(None, None), eps, alone.key, mask)
    per_channel = [running_mean, running_var, epilogue.weight, epilogue.bias]
    dtypes = {tensor.dtype for tensor in per_channel if tensor is not None}
    mixed = input.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}  # torch's one allowed mixture
    if dtypes - {input.dtype} and not mixed:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        per_channel = [None if tensor is None else tensor.to(dtype) for tensor in per_channel]
    running_mean, running_var, weight, bias = per_channel
    y = F.batch_norm(input, running_mean, running_var, weight, bias, batch_statistics, 0.0, eps)
    return epilogue.finish(y)
