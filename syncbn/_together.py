"""`normalize_together`: several layers called at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._block import block
from ._layer import Synchronised
from .errors import GroupError, InputError


def normalize_together(
    layers: Sequence[Any], inputs: Sequence[Tensor], residuals: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Call each layer on its input, with one collective for all of them each way.

    Returns what `[layer(x, residual) for layer, x, residual in zip(layers, inputs, residuals)]` returns, to rounding:
    outputs, gradients, running statistics (also where a layer occurs twice, in this order). Layers in eval are called.
    What `together` says of the graph holds here, too.

    Args:
        layers: SyncBatchNorm, or converted, all of one process group; none depends on the output of another, none has a
            forward of its own.
        inputs: one `(N, C, *)` for each layer, all on one device; shapes, C and dtypes may differ.
        residuals: None, or one for each layer, each a tensor or None.

    Returns:
        The outputs, in the order of the layers.

    Raises:
        InputError: another number of inputs or residuals than of layers, something that is no layer of ours or has a
            forward of its own, inputs on several devices, or what the layers themselves refuse. Nothing has been
            computed or sent then.
        GroupError: layers of several process groups.

    Collectives: one float64 all-reduce of Σ(2C+1) numbers over the layers that train, and a backward of Σ2C over those
    whose input needs a gradient; without any, none.

    Example:
        >>> import syncbn, torch
        >>> levels = [torch.randn(2, 8, size, size) for size in (8, 4, 2)]  # of a feature pyramid
        >>> norms = [syncbn.SyncBatchNorm(8) for _ in levels]
        >>> [tuple(y.shape) for y in normalize_together(norms, levels)]
        [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]
    """
    residuals = [None] * len(layers) if residuals is None else residuals
    for name, given in (("inputs", inputs), ("residuals", residuals)):
        if len(given) != len(layers):
            raise InputError(f"expected {len(layers)} {name}, one for each of `layers`, got {len(given)}")
    for number, layer in enumerate(layers):
        if not isinstance(layer, Synchronised):
            raise InputError(
                f"layers[{number}] is a {type(layer).__name__}, no layer of syncbn: convert_sync_batchnorm(model) first"
            )
        if type(layer).forward is not Synchronised.forward:
            raise InputError(
                f"layers[{number}], a {type(layer).__name__}, has a forward of its own, which uses the output at once: "
                "call it by itself"
            )
    devices = {str(x.device) for x in inputs}
    if len(devices) > 1:
        raise InputError(f"expected `inputs` on one device, got {', '.join(sorted(devices))}: one call for each")
    groups = {layer._group.key for layer in layers}
    if len(groups) > 1:
        raise GroupError(f"expected `layers` of one process group, got {', '.join(sorted(groups))}: one call for each")
    with block():
        return [layer(x, residual) for layer, x, residual in zip(layers, inputs, residuals, strict=True)]
