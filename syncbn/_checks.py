"""What no replica can normalise is refused here, before any collective."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses import FakeTensor

from ._compiled import native
from ._epilogue import Epilogue
from .errors import DTypeError, InputError


def check(
    input: Tensor,
    epilogue: Epilogue,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None = None,
) -> None:
    """Refuse an input that is not (N, C, *) of a floating dtype, and tensors that do not fit it.

    Raises:
        InputError: a shape or a device, or a mask that needs a gradient.
        DTypeError: a dtype, or a kind of tensor that holds its values elsewhere (DTensor).
    """
    if torch._C._get_tracing_state() is not None:  # of torch.jit.trace, which would bake the shapes in
        return
    per_channel = (epilogue.weight, epilogue.bias, running_mean, running_var)
    residual = epilogue.residual
    usual = native is not None and not torch.compiler.is_compiling() and native.fit(input, residual, *per_channel)
    if not usual:  # else it is known already, in less time
        _check_each(input, residual, per_channel)
    if mask is not None:
        _check_mask(mask, input)


def _check_each(input: Tensor, residual: Tensor | None, per_channel: tuple[Tensor | None, ...]) -> None:
    shape = input.shape
    if len(shape) < 2:
        raise InputError(f"expected 2D or more input, got {len(shape)}D of shape {tuple(shape)}: pass (N, C, *)")
    _check_kind("input", input)
    channels = shape[1]
    if channels == 0:
        raise InputError(f"expected at least 1 channel, got input of shape {tuple(shape)}")
    expected = (channels,)
    for name, tensor in zip(_PER_CHANNEL, per_channel, strict=True):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise InputError(
                f"expected {name} of shape ({channels},) for input of shape {tuple(shape)}, "
                f"got {tuple(tensor.shape)}: the input's axis 1 must be the layer's channels"
            )
        _check_kind(name, tensor)
        _check_device(name, tensor, input)
    if residual is not None:
        if residual.shape != shape:
            raise InputError(
                f"expected residual of the input's shape {tuple(shape)}, got {tuple(residual.shape)}: expand it, or "
                "add it to the norm's output"
            )
        _check_kind("residual", residual)
        if residual.dtype != input.dtype:
            raise DTypeError(
                f"expected residual of the input's dtype {input.dtype}, got {residual.dtype}: pass "
                "residual.to(input.dtype)"
            )
        _check_device("residual", residual, input)


_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def _check_mask(mask: Tensor, input: Tensor) -> None:
    samples, _, *spatial = input.shape
    with_channel, without = (samples, 1, *spatial), (samples, *spatial)
    if mask.shape != with_channel and mask.shape != without:  # in torch.compile, `in` knows no dynamic sizes
        raise InputError(
            f"expected mask of shape {with_channel} or {without} for input of shape "
            f"{tuple(input.shape)}, got {tuple(mask.shape)}: one weight for all channels of a position"
        )
    if mask.dtype == torch.bool:
        _check_ordinary("mask", mask)
    elif not mask.is_floating_point():
        raise DTypeError(
            f"expected mask as bool or floating-point weights, got {mask.dtype}: pass mask.bool(), or mask.float() for "
            "weights"
        )
    else:
        _check_kind("mask", mask)
    if mask.requires_grad:
        raise InputError("expected mask without a gradient, its weights are constants: pass mask.detach()")
    _check_device("mask", mask, input)


def _check_kind(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        remedy = "dequantize()" if tensor.is_quantized else "float()"
        raise DTypeError(f"expected floating-point {name}, got {tensor.dtype}: pass {name}.{remedy}")
    _check_ordinary(name, tensor)


def _check_ordinary(name: str, tensor: Tensor) -> None:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_traced(tensor):
        raise DTypeError(
            f"expected an ordinary tensor as {name}, got a {type(tensor).__name__}, whose values are elsewhere: "
            "pass this replica's own part, e.g. DTensor.to_local()"
        )


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise InputError(
            f"expected {name} on {input.device}, where the input is, got {tensor.device}: move one of them"
        )


def is_traced(tensor: Tensor) -> bool:
    """Tell whether somebody follows the operations on `tensor` instead of, or besides, computing them.

    torch.compile, torch.jit.trace, fake tensors, make_fx and other dispatch modes.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or isinstance(tensor, FakeTensor)
    )


def refuse_transforms(input: Tensor) -> None:
    """Raise InputError under the transforms that batch norm over replicas has no rule for."""
    for interpreter in torch._C._functorch.get_interpreter_stack() or ():
        transform = interpreter.key()
        if transform in (_Transform.Vmap, _Transform.Jvp):
            raise InputError(
                f"SyncBatchNorm cannot be used under torch.func.{transform.name.lower()}: use torch.func.grad or vjp, "
                "or syncbn.reverted(model)"
            )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(input).tangent is not None:  # type: ignore[no-untyped-call]
        raise InputError("SyncBatchNorm has no forward mode derivative: use backward, or syncbn.reverted(model)")


_Transform = torch._C._functorch.TransformType
