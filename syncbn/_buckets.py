"""Many tensors as few vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def repeats(tensor: Tensor) -> bool:
    """Tell whether elements share memory, as `expand` makes them: such a tensor cannot be written to."""
    return not tensor.is_contiguous() and any(
        s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )


def without_repeats(tensor: Tensor) -> Tensor:
    """Return the view in which each element of memory is once."""
    if not repeats(tensor):
        return tensor
    return tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]


def buckets(
    tensors: Iterable[Tensor], dtype_of: Callable[[Tensor], torch.dtype], at_least: int
) -> Iterator[list[Tensor]]:
    """Group tensors, large ones in pieces, of one dtype and device until they have `at_least` bytes, less than twice.

    The order is the same on every replica.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((dtype_of(tensor), tensor.device), []).append(tensor)
    for (dtype, _), kind in kinds.items():
        enough = at_least // dtype.itemsize
        bucket: list[Tensor] = []
        numel = 0
        for tensor in kind:
            for piece in _pieces(tensor, enough):
                bucket.append(piece)
                numel += piece.numel()
                if numel >= enough:
                    yield bucket
                    bucket, numel = [], 0
        if numel > 0:
            yield bucket


def _pieces(tensor: Tensor, at_most: int) -> Iterator[Tensor]:
    """Cut a tensor along its first dimensions into views of `at_most` elements."""
    if tensor.numel() <= at_most:
        yield tensor
    elif rows := at_most * len(tensor) // tensor.numel():
        yield from torch.split(tensor, rows)
    else:
        for row in tensor:
            yield from _pieces(row, at_most)


def flatten(bucket: Sequence[Tensor]) -> Tensor:
    """Return the values of tensors as one vector; it may be the tensor's own memory if there is one only."""
    flat: Tensor = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]  # one call for all
    return flat.detach()


def parts_of(flat: Tensor, bucket: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return views of `flat` in the shapes of the tensors that `flatten` has read."""
    parts: tuple[Tensor, ...] = _unflatten_dense_tensors(flat, bucket)  # type: ignore[no-untyped-call]
    return parts


def to_words(flat: Tensor) -> Tensor:
    """Return the bytes of a vector as numbers, four to a float64; zeros fill up to a multiple of four elements."""
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 4)])  # a copy, without conjugate and negative bits
    return padded.view(torch.int32).double()


def from_words(words: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the vector that `to_words` took apart."""
    return words.int().view(dtype)[:numel]
