"""A subclass of nn.BatchNorm* with a forward of its own keeps it: the normalisation in it is synchronised.

Where that forward calls `super().forward`, it reaches ours, by the order of the bases. Where it calls `F.batch_norm`,
that call is caught while the forward runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._epilogue import Epilogue, tensors_of
from ._layer import Synchronised, is_exported
from ._statistics import Running
from .errors import ConversionError
from .functional import evaluate, train


class OwnForward:
    """Stands before the subclass among the bases of its generated class, and `Synchronised` behind it."""

    _settable = False

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the subclass's forward, with its batch normalisation over all replicas.

        Raises:
            ConversionError: it normalised nothing, in training.
        """
        own: Any = super().forward  # type: ignore[misc]
        if not catches(self):
            if self.training:
                self.check_is_alone()
            return own(*args, **kwargs)
        calls: list[Any] = []
        with _Catch(self, calls):
            y = own(*args, **kwargs)
        if not calls:
            raise ConversionError(
                f"the forward of {self._original_class.__qualname__} called neither super().forward nor F.batch_norm, "
                "so nothing was synchronised: leave the layer out of the conversion (skip=[...]), or let the class "
                "derive from syncbn.SyncBatchNorm and call super().forward"
            )
        return y


def catches(layer: Any) -> bool:
    """Tell whether this layer's call of batch_norm is caught now: in training, except in an export."""
    return layer.training and not is_exported()


_OPERATOR = (torch.ops.syncbn.forward, torch.ops.syncbn.forward.default)


class BatchNormCall(NamedTuple):
    """The arguments of `F.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class CatchBatchNorm(TorchFunctionMode):
    """Under it calls of `F.batch_norm` and `torch.batch_norm` go to `batch_norm`."""

    def batch_norm(self, call: BatchNormCall) -> Tensor:
        """Do what was called."""
        return F.batch_norm(*call)

    def note(self, func: Any, args: tuple[Any, ...]) -> None:
        """Look at the call of any other function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.batch_norm(BatchNormCall(*args, **kwargs))
        if func is torch.batch_norm:
            return self.batch_norm(_of_operator(*args, **kwargs))
        self.note(func, args)
        return func(*args, **kwargs)


def _of_operator(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> BatchNormCall:
    """Take the arguments of `torch.batch_norm`, in another order and without defaults."""
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


class _Catch(CatchBatchNorm):
    """Sends the calls of `F.batch_norm` for `layer` to ours, and notes each normalisation of it in `calls`."""

    def __init__(self, layer: Any, calls: list[Any]) -> None:
        super().__init__()
        self.layer = layer
        self.calls = calls
        # A child that is a norm layer as well, left out of the conversion, normalises for itself.
        children = [m for m in layer.modules() if m is not layer] if layer._modules else []
        self.others = [t for m in children for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

    def note(self, func: Any, args: tuple[Any, ...]) -> None:
        """Note a normalisation by `super().forward`: in torch.compile it is the operation, else `train`."""
        if (func is train and self._is_for_layer(tensors_of(args[1]))) or (
            func in _OPERATOR and self._is_for_layer(args[1:4])
        ):
            self.calls.append(func)

    def batch_norm(self, call: BatchNormCall) -> Tensor:
        """Synchronise it, if it is for the layer."""
        input, running_mean, running_var, weight, bias, training, momentum, eps = call
        if not self._is_for_layer((running_mean, running_var, weight, bias)):
            return super().batch_norm(call)
        self.calls.append(F.batch_norm)
        epilogue = Epilogue(weight, bias, None, self.layer._activation)
        if not training:
            return evaluate(input, epilogue, running_mean, running_var, eps)
        running = Running(running_mean, running_var, None, momentum)
        return train(input, epilogue, running, eps, self.layer._group.key, None, self.layer._called())

    def _is_for_layer(self, tensors: tuple[Tensor | None, ...]) -> bool:
        return not any(t is other for t in tensors if t is not None for other in self.others)


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Tell whether the forward of this norm layer class is another than torch's."""
    return cls.forward not in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, Synchronised.forward)
