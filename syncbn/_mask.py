"""Which values count: masks and weights of positions, and the mask of a padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._plain import are_plain
from .errors import DTypeError, InputError


def valid_positions(sizes: Tensor | Sequence[int] | Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Return the mask of a padded batch: True where sample n holds values, within its own sizes from the start.

    What `sync_batch_norm` and the layers take as `mask`. Issues no collective.

    Args:
        sizes: integers: (N,) lengths for `like` (N, C, L), or (N, D) sizes for D dimensions behind the channels, as a
            tensor or a sequence (of tuples, of torch.Size: `[image.shape[-2:] for image in images]`).
        like: the padded batch `(N, C, *)`, or another tensor of its shape and device; its values do not matter.
            Behind a convolution with strides the sizes are those behind it, too.

    Returns:
        bool `(N, 1, *)` on the device of `like`.

    Raises:
        InputError: sizes that are not one for each sample and dimension, or negative, or larger than `like` (a
            ValueError). Sizes on an accelerator are not read: there, negative ones count as 0, larger ones as all.
        DTypeError: sizes that are not integers (a TypeError).

    Example:
        >>> import torch
        >>> valid_positions([1, 3], torch.zeros(2, 8, 4)).int()
        tensor([[[1, 0, 0, 0]],
        <BLANKLINE>
                [[1, 1, 1, 0]]], dtype=torch.int32)
        >>> valid_positions([(2, 2), (1, 3)], torch.zeros(2, 8, 4, 4)).sum()
        tensor(7)
    """
    spatial = like.shape[2:]
    if not spatial:
        raise InputError(f"expected like of shape (N, C, *) with dimensions to pad, got {tuple(like.shape)}")
    given = _as_tensor(sizes)
    expected = (like.shape[0], len(spatial))
    sizes = given.view(expected) if given.numel() == 0 == like.shape[0] else given
    if sizes.dim() == 1 == len(spatial):
        sizes = sizes.unsqueeze(1)
    if sizes.shape != expected:
        raise InputError(
            f"expected sizes of shape {expected}, one for each sample and dimension of like {tuple(like.shape)}, got "
            f"{tuple(given.shape)}"
        )
    if not torch.compiler.is_compiling() and are_plain([sizes], "cpu"):
        _refuse_misfits(sizes, spatial)
    sizes = sizes.to(like.device)
    mask = torch.ones((), dtype=torch.bool, device=like.device)
    for axis, length in enumerate(spatial):
        ahead = torch.arange(length, device=like.device) < sizes[:, axis, None]  # (N, length)
        shape = [like.shape[0], 1, *[1] * len(spatial)]
        shape[axis + 2] = length
        mask = mask & ahead.view(shape)
    return mask


def _as_tensor(sizes: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """Return int64."""
    try:
        given = torch.as_tensor(sizes, device=sizes.device if isinstance(sizes, Tensor) else "cpu")
    except (TypeError, ValueError) as error:  # ragged, or no numbers
        raise InputError(f"expected sizes as integers, equally many for each sample, got {sizes!r}") from error
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise DTypeError(f"expected sizes as integers, got {given.dtype}: pass sizes.long()")
    return given.long()


def _refuse_misfits(sizes: Tensor, spatial: Sequence[int]) -> None:
    for sample, of_sample in enumerate(sizes.tolist()):
        if any(not 0 <= size <= length for size, length in zip(of_sample, spatial, strict=True)):
            raise InputError(
                f"expected sizes between 0 and those of like, {tuple(spatial)}, got {tuple(of_sample)} for sample "
                f"{sample}"
            )


def weights_of(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask`, (N, 1, *) or (N, *), as weights (N, 1, *) in the dtype of `x`.

    What is no weight (negative, infinite or NaN) becomes NaN. It makes the sums NaN, and so tells every replica, when
    they have been added up, what this replica alone knows.
    """
    weights = _positions(mask, x).to(x.dtype)
    if mask.dtype == torch.bool:
        return weights
    return torch.where((weights >= 0) & (weights < torch.inf), weights, torch.nan)


def inside(values: Tensor, weights: Tensor) -> Tensor:
    """Return `values` with zeros where the weight is 0: a product would keep NaN and infinity."""
    return values.masked_fill(~(weights > 0), 0)


def finite_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with zeros where the weight is 0 and the value is NaN or infinite.

    For backward, where every position counts by its gradient: 0 times NaN is NaN.
    """
    return x.masked_fill(~((_positions(mask, x) > 0) | x.isfinite()), 0)


def _positions(mask: Tensor, x: Tensor) -> Tensor:
    return mask if mask.dim() == x.dim() else mask.unsqueeze(1)


def flat_without_values(total: Tensor) -> Tensor:
    """Return a new `[Σwx, Σwx², N]`, with an infinite variance where N <= 1, (2C+1,).

    Then 1/√(σ²+ε) is 0 and y = bias, whatever the values outside are.
    """
    s1, s2, count = total.tensor_split([total.numel() // 2, total.numel() - 1])
    return torch.cat([s1, torch.where(count <= 1, torch.inf, s2), count])
