"""What follows the normalisation in the same pass over memory: y = activation(weight·x̂ + bias + residual)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation function that the kernels know, in torch's definition.

    Attributes:
        name: "relu", "leaky_relu", "silu" or "hardswish".
        slope: of leaky_relu where its argument is negative; 0 for the others.
    """

    name: str
    slope: float = 0.0

    def __call__(self, z: Tensor, *, inplace: bool = False) -> Tensor:
        """Apply it."""
        return _FUNCTIONS[self.name].forward(z, self.slope, inplace)

    def gradient(self, dy: Tensor, z: Tensor) -> Tensor:
        """Return dy times the derivative at `z`; differentiable to any order."""
        return _FUNCTIONS[self.name].gradient(dy, z, self.slope)

    def __str__(self) -> str:
        return f"{self.name}({self.slope})" if self.name == "leaky_relu" else self.name


class _Function(NamedTuple):
    """One of the functions: the class that is it in torch.nn, the slope of its name alone, value and gradient."""

    module: type[nn.Module]
    slope: float
    forward: Callable[[Tensor, float, bool], Tensor]
    gradient: Callable[[Tensor, Tensor, float], Tensor]


def _silu_gradient(dy: Tensor, z: Tensor, _: float) -> Tensor:
    sigmoid = z.sigmoid()  # torch's own silu_backward has no derivative
    return dy * sigmoid * (1 + z * (1 - sigmoid))


_FUNCTIONS = {
    "relu": _Function(
        nn.ReLU, 0.0, lambda z, _, inplace: F.relu(z, inplace), lambda dy, z, _: _aten.threshold_backward(dy, z, 0)
    ),
    "leaky_relu": _Function(
        nn.LeakyReLU, 0.01, F.leaky_relu, lambda dy, z, slope: _aten.leaky_relu_backward(dy, z, slope, False)
    ),
    "silu": _Function(nn.SiLU, 0.0, lambda z, _, inplace: F.silu(z, inplace), _silu_gradient),
    "hardswish": _Function(
        nn.Hardswish,
        0.0,
        lambda z, _, inplace: F.hardswish(z, inplace),
        lambda dy, z, _: _aten.hardswish_backward(dy, z),
    ),
}
NAMES = tuple(_FUNCTIONS)

ActivationLike: TypeAlias = "str | nn.Module | Activation | None"


def activation_of(given: ActivationLike) -> Activation | None:
    """Return the activation that `given` names or is; None, or an nn.Identity, is none.

    Raises:
        InputError: it is none that can be fused.
    """
    found = known_activation(given)
    if found is None and not (given is None or type(given) is nn.Identity):
        raise InputError(
            f"activation={given!r} cannot be fused: pass one of {', '.join(NAMES)}, the torch.nn module that is one "
            "(nn.LeakyReLU(0.1)), or None, and apply any other behind the norm"
        )
    return found


def known_activation(given: object) -> Activation | None:
    """Return the activation that `given` names or is, or None if it is none that can be fused."""
    if isinstance(given, Activation) and given.name in _FUNCTIONS:
        return given
    if isinstance(given, str) and given in _FUNCTIONS:
        return Activation(given, _FUNCTIONS[given].slope)
    for name, function in _FUNCTIONS.items():
        if type(given) is function.module:  # a subclass may do something else
            return Activation(name, getattr(given, "negative_slope", 0.0))
    return None


class Epilogue(NamedTuple):
    """The operands of y = activation(weight·x̂ + bias + residual).

    Attributes:
        weight: γ, (C,), any floating dtype, or None for 1.
        bias: β, (C,), any floating dtype, or None for 0.
        residual: of the shape and dtype of the input, or None for 0.
        activation: or None for the identity.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: Activation | None = None

    def finish(self, y: Tensor) -> Tensor:
        """Add the residual to `y` = weight·x̂ + bias and apply the activation, in the memory of `y`."""
        z = self._add(y)
        return z if self.activation is None else self.activation(z, inplace=True)

    def gradient(self, dy: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of `y` = weight·x̂ + bias, whose memory takes the residual, too."""
        return dy if self.activation is None else self.activation.gradient(dy, self._add(y))

    def _add(self, y: Tensor) -> Tensor:
        return y if self.residual is None else y.add_(self.residual)


def tensors_of(epilogue: Epilogue) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return weight, bias and residual. A function: the compiler of torch 2.8 follows no property of a named tuple."""
    return epilogue.weight, epilogue.bias, epilogue.residual
