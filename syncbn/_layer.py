"""The layer: state, and one call of `functional.sync_batch_norm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ._statistics import recomputing
from .comm._groups import Group, ProcessGroup
from .errors import InputError
from .functional import sync_batch_norm


class SyncBatchNorm(_BatchNorm):
    r"""Batch normalisation with the statistics of the whole mini-batch, however many replicas it is spread over.

    Formula, shapes, dtypes, errors and collectives are those of `syncbn.functional.sync_batch_norm`. Parameters,
    buffers and state_dict are those of `torch.nn.BatchNorm2d`.

    In training a forward issues one all-reduce and a backward one, so every replica of the group must run the layer,
    forward and backward, equally often. In eval it is `torch.nn.BatchNorm*` bit for bit, and needs no peer.

    Args:
        num_features: C, channels of the input (N, C, *).
        eps: added to the variance.
        momentum: weight of the new value in the running statistics (1 - decay); None averages all batches equally.
        affine: learn `weight` and `bias`.
        track_running_stats: keep running statistics for eval; without them eval uses this replica's own batch.
        process_group: the replicas, see `sync_batch_norm`. Looked up at the first training forward. Deep copies of the
            layer share it; a pickle keeps None, "world", "node" and int, and drops handles.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn `bias` too, if affine.

    Raises:
        InputError: fewer than 1 channel (a ValueError).
        GroupError: `process_group` is not a group.

    Example:
        >>> import torch
        >>> layer = SyncBatchNorm(16)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

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
    ) -> None:
        if num_features < 1:
            raise InputError(f"expected at least 1 channel, got {num_features=}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)  # torch < 2.10 knows no bias argument
        self._group = Group(process_group)

    @property
    def process_group(self) -> ProcessGroup:
        """The replicas, as given."""
        return self._group.spec

    @process_group.setter
    def process_group(self, value: ProcessGroup) -> None:
        self._group = Group(value)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (N, C, *): `sync_batch_norm` checks it. A converted layer has the check of its original class here."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (N, C, *)."""
        self._check_input_dim(input)
        self._check_channels(input)
        tracked = not self.training or self.track_running_stats  # the condition of nn.BatchNorm
        y = sync_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training,
            self._momentum(),
            self.eps,
            self._group.communicator() if self.training else None,
        )
        if self.training and tracked and self.num_batches_tracked is not None and not recomputing():
            self.num_batches_tracked.add_(1)  # last: an error above leaves all of the state as it was
        return y

    def _check_channels(self, input: Tensor) -> None:
        """Without parameters and buffers nothing else tells the function how many channels there should be."""
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
            return
        if input.dim() > 1 and input.shape[1] != self.num_features:
            raise InputError(
                f"expected {self.num_features} channels, got {input.shape[1]} in input of shape {tuple(input.shape)}"
            )

    def _momentum(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 0.0
        return 1.0 / (self.num_batches_tracked + 1).double()  # a tensor: no host synchronisation

    def extra_repr(self) -> str:
        """Name the group where it is not the world."""
        group = "" if self.process_group is None else f", process_group={self.process_group!r}"
        return f"{super().extra_repr()}{group}"  # type: ignore[no-untyped-call]
