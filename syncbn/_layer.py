"""The layer: state, and one call of `functional.train` or `functional.evaluate`."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _block
from ._epilogue import Activation, ActivationLike, Epilogue, activation_of
from ._joint import Call
from ._names import UNNAMED
from ._statistics import Running
from .comm._groups import Group, ProcessGroup, communicator
from .errors import ConversionError, InputError
from .functional import evaluate, train

LEAF = "torch.nn.modules.batchnorm"  # as `__module__` of an object: tracers of torch.fx ask objects, not classes


class Synchronised(_BatchNorm):
    """What every layer of ours does, made or converted: a forward over all replicas, on the state of nn.BatchNorm."""

    _group: Group
    _name = UNNAMED
    _activation: Activation | None = None
    _settable = True  # the activation; not where a forward of somebody else's decides what follows

    @property
    def process_group(self) -> ProcessGroup:
        """The replicas, as given."""
        return self._group.spec

    @process_group.setter
    def process_group(self, value: ProcessGroup) -> None:
        self._group = Group(value)

    @property
    def activation(self) -> Activation | None:
        """What is applied to the output, in the same pass; settable by name or by the torch.nn module that is it."""
        return self._activation

    @activation.setter
    def activation(self, value: ActivationLike) -> None:
        if not self._settable:
            raise ConversionError(f"{type(self).__name__} has a forward of its own: apply the activation there")
        self._activation = activation_of(value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; an activation that is a module becomes no submodule, as nn.Module would have it."""
        if name == "activation" and type(self).activation is Synchronised.activation:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (N, C, *): `train` checks it. A converted layer has the check of its original class here."""

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, `(N, C, *)`, add `residual`, of its shape and dtype, and apply the activation.

        A `mask`, `(N, 1, *)` or `(N, *)`, says which values the statistics are taken over, see `sync_batch_norm`.
        """
        self._check_input_dim(input)
        epilogue = Epilogue(self.weight, self.bias, residual, self._activation)
        tracked = not self.training or self.track_running_stats  # the condition of nn.BatchNorm
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        if epilogue.weight is None and mean is None:
            self._check_channels(input)
        if not self.training:
            return evaluate(input, epilogue, mean, var, self.eps, mask)
        if is_exported():
            return epilogue.finish(self._as_in_nn(input, mask))
        running = Running(mean, var, self.num_batches_tracked if tracked else None, self.momentum)
        if _block.blocks and self._settable:  # a forward of somebody else's uses the output at once
            y = _block.wait(self, Call(input, epilogue, running, self.eps, mask, self._name.text), self._group.key)
            if y is not None:
                return y
        return train(input, epilogue, running, self.eps, self._group.key, mask, self._called())

    def _called(self) -> str | Tensor:
        """Return the layer's name, in compiled code its number."""
        return self._name.number if torch.compiler.is_compiling() else self._name.text

    def _check_channels(self, input: Tensor) -> None:
        """Without parameters and buffers nothing else tells how many channels there should be."""
        if torch._C._get_tracing_state() is None and input.dim() > 1 and input.shape[1] != self.num_features:
            raise InputError(
                f"expected {self.num_features} channels, got {input.shape[1]} in input of shape {tuple(input.shape)}"
            )

    def _as_in_nn(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """Do what nn.BatchNorm does in training, for exporters and for what recognises it in their graphs."""
        self.check_is_alone()
        if mask is not None:
            raise ConversionError(
                "an exported program in training has nn.BatchNorm's statistics, which know no mask: export in eval mode"
            )
        return _BatchNorm.forward(self, input)  # super's may be another norm layer's

    def check_is_alone(self) -> None:
        """Raise ConversionError in an export among several replicas."""
        if not _is_alone(self._group.key):
            raise ConversionError(
                "an exported program has no replicas, its statistics in training would be those of one process: "
                "export syncbn.reverted(model) if that is what you want, or export in eval mode"
            )

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script."""
        raise ConversionError(
            "torch.jit.script cannot compile a layer that communicates: script syncbn.reverted(model), or use "
            "torch.jit.trace or torch.compile"
        )

    def extra_repr(self) -> str:
        """Name the activation where there is one, and the group where it is not the world."""
        activation = "" if self._activation is None else f", activation={self._activation}"
        spec = self._group.spec
        group = "" if spec is None else f", process_group={spec!r}"
        return f"{super().extra_repr()}{activation}{group}"  # type: ignore[no-untyped-call]


def is_exported() -> bool:
    """Tell whether torch.export or the exporter to ONNX runs the model."""
    if torch.compiler.is_compiling():
        return bool(_is_exporting())
    return torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_exporting() -> bool:
    """Ask torch itself: the compiler of torch 2.8 takes `is_exporting` for true in all that it compiles."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_alone(group: str) -> bool:
    return communicator(group).size == 1


class SyncBatchNorm(Synchronised, nn.BatchNorm2d, metaclass=ABCMeta):
    r"""Batch normalisation with the statistics of the whole mini-batch, however many replicas it is spread over.

    Formula, shapes, dtypes, errors and collectives are those of `syncbn.functional.sync_batch_norm`. Parameters,
    buffers and state_dict are those of `torch.nn.BatchNorm2d`.

    In training a forward issues one all-reduce and a backward one, so every replica of the group must run the layer,
    forward and backward, equally often. In eval it is `torch.nn.BatchNorm*` bit for bit, and needs no peer.

    It is an nn.BatchNorm2d so that the filters of optimizers and trainers find it, for inputs of any number of
    dimensions. Converted layers are instances of SyncBatchNorm, and of their own original class.

    Args:
        num_features: C, channels of the input `(N, C, *)`.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics (1 - decay); None averages all batches equally.
        affine: learn `weight` and `bias`.
        track_running_stats: keep running statistics for eval; without them eval uses this replica's own batch.
        process_group: the replicas, see `sync_batch_norm`. Looked up at the first training forward. Deep copies of the
            layer share it; a pickle keeps None, "world", "node" and int, and drops handles.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn `bias` too, if affine.
        activation: applied to the output in the same pass over memory, see `sync_batch_norm`. A forward hook sees what
            comes out of it, not what the norm alone would give.

    Raises:
        InputError: fewer than 1 channel, or an activation that cannot be fused (a ValueError).
        GroupError: `process_group` is not a group.

    Example:
        >>> import torch
        >>> layer = SyncBatchNorm(16)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
        >>> block = SyncBatchNorm(16, activation="relu")  # of a ResNet: relu(norm(x) + residual)
        >>> block(torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)).min() >= 0
        tensor(True)
    """

    convert_sync_batchnorm: ClassVar[Callable[..., Any]]  # syncbn.convert_sync_batchnorm, set in _convert.py

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
    ) -> None:
        if num_features < 1:
            raise InputError(f"expected at least 1 channel, got {num_features=}")
        self.__module__ = LEAF
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)  # torch < 2.10 knows no bias argument
        self._group = Group(process_group)
        self._activation = activation_of(activation)
