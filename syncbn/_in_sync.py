"""Are the running statistics the same on every rank?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ._alike import Named, check_alike, check_plain, device_of, facts_of, problem_with
from ._buckets import from_words, to_words
from ._population import WHAT, buffers_of, layers_of
from .comm._groups import ProcessGroup, resolve
from .comm._place import place
from .comm._protocol import BaseCommunicator
from .errors import InputError


@torch.no_grad()
def assert_in_sync(model: nn.Module, *, process_group: ProcessGroup = None) -> None:
    """Check that the running statistics of all batch norm layers are the same on every rank, bit for bit.

    Those of synchronised layers are, without DDP's broadcasts: where they are not, ranks have run other layers, or a
    layer is not synchronised.

    Args:
        model: of the same structure on every rank.
        process_group: the ranks, see `SyncBatchNorm`.

    Raises:
        InputError: they differ, or the layers do: the same on every rank, with a table of layers, buffers, ranks that
            differ from rank 0 and the largest difference.
        DTypeError: running statistics are not plain tensors.

    Collectives: one of 3P numbers among P ranks; before the error another, of all ranks' statistics.

    Example:
        >>> assert_in_sync(nn.BatchNorm1d(3))
    """
    comm = resolve(process_group)
    named = buffers_of(layers_of(model))
    here = _bytes([buffer for _, buffer in named if not problem_with(buffer)])
    same = check_alike(facts_of(named), comm, WHAT, device_of(named), also=here.tolist())
    check_plain(named)
    if not same:
        raise InputError(f"running statistics differ between ranks\n{_table(named, _gathered(here, comm, named))}")


def _bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Return all the memory of tensors, uint8 on the CPU."""
    return torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *(_as_bytes(tensor) for tensor in tensors)])


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().flatten().view(torch.uint8)


def _gathered(here: Tensor, comm: BaseCommunicator, named: Named) -> Iterator[Sequence[Tensor]]:
    """Yield the tensors of each rank, from the bytes of this rank's; one all-reduce."""
    words = to_words(here)
    rows = words.new_zeros(comm.size, len(words), device=device_of(named))
    rows[comm.rank] = words
    tensors = [tensor for _, tensor in named]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    for row in comm.all_reduce(rows.flatten(), place("assert_in_sync")).view(comm.size, -1).cpu():
        parts = torch.split(from_words(row, len(here), torch.uint8), sizes)
        yield [part.clone().view(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def _table(named: Named, ranks: Iterable[Sequence[Tensor]]) -> str:
    """Return a line for each tensor that is not the same everywhere."""
    lines = ["layer and buffer: ranks unlike rank 0, largest difference"]
    for (name, _), (first, *others) in zip(named, zip(*ranks, strict=True), strict=True):
        unlike = {rank: t for rank, t in enumerate(others, 1) if not torch.equal(_as_bytes(t), _as_bytes(first))}
        if unlike:
            largest = torch.stack([(t.double() - first.double()).abs().max() for t in unlike.values()]).max()
            lines.append(f"{name}: {', '.join(map(str, unlike))}, {largest.item():.3g}")
    return "\n".join(lines)
