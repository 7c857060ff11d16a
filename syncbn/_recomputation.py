"""Which forward repeats one that moved the running statistics already, as activation checkpointing makes it do."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._saved import is_replayed
from ._statistics import Running

_FORWARDS = 64  # kept of each layer: micro-batches in flight, or uses of a shared layer
_NUMBERS = 65  # kept of each forward: N, and Σx² of the last channels
_NOISE = 1e-5  # a repetition on a GPU may add up in another order

_moved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a layer's buffer -> the last forwards that moved it


def is_repeatable() -> bool:
    """Tell whether the forward that begins here may be run again: nothing, or not what it saves, is kept for backward.

    True without grad, under saved-tensor hooks, and inside a backward (where checkpoints may be nested).
    """
    return (
        not torch.is_grad_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or _in_backward()
    )


def once(total: Tensor, running: Running, *, repeatable: bool) -> Tensor:
    """Return `total`, with -1 in place of N if this forward repeats one that moved `running`: it moves nothing then.

    Only a forward inside a backward can be a repetition, and it is one if an earlier forward had the same sums over all
    replicas. So all replicas agree, and a first forward inside a backward (adjoint methods; wrappers that switch
    tracking off at first, as fairscale's) counts. Does not read numbers back from an accelerator.

    Args:
        total: `[Σx, Σx², N]`, float64 (2C+1,), over all replicas.
        running: the statistics that are to be moved.
        repeatable: see `is_repeatable`.
    """
    if not repeatable:  # so not inside a backward either
        return total
    if is_replayed():
        return torch.cat([total[:-1], total.new_full((1,), -1.0)])
    buffer = next((buffer for buffer in (running.mean, running.var, running.batches) if buffer is not None), None)
    if buffer is None:
        return total
    forwards = _moved.setdefault(buffer, deque(maxlen=_FORWARDS))  # type: ignore[no-untyped-call]
    sums = total[-_NUMBERS:].clone()
    if _in_backward() and forwards:
        known = torch.stack(tuple(forwards))
        repeats = torch.isclose(known, sums, rtol=_NOISE, atol=0, equal_nan=True).all(1).any()
        total = torch.cat([total[:-1], torch.where(repeats, -1.0, total[-1:])])
    forwards.append(sums)
    return total


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
