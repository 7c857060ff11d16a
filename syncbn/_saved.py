"""Sums over the replicas that are kept for the recomputation of a checkpointed region, which then issues none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from ._statistics import Running
from .errors import InputError

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def saved_statistics(within: Callable[[], Contexts] = noop_context_fn) -> Contexts:
    """Return the two contexts with which torch recomputes a checkpointed region without a collective.

    Pass the function itself, on every replica: `checkpoint(region, x, use_reentrant=False,
    context_fn=syncbn.saved_statistics)`. In the forward the `[Σx, Σx², N]` of all replicas is kept of each layer, 2C+1
    float64 numbers. When the region is recomputed, however often, its layers get them back in the same order: the
    results are the same bit for bit, running statistics stay, and `Σx` and `Σx²` are not computed either.

    Of regions within regions each names it for its own recomputation. Layers that run in another thread than the region
    are recomputed as without it, with a collective. torch refuses it in a compiled function that calls `checkpoint`
    itself; a checkpoint of a compiled function takes it.

    Args:
        within: a `context_fn` of somebody else, whose contexts lie within these, as `functools.partial(
            create_selective_checkpoint_contexts, policy)`, where the policy treats all `torch.ops.syncbn.forward`
            alike. `functools.partial(syncbn.saved_statistics, within)` is the one for both.

    Collectives: none in the recomputation. Those of forward and backward stay.

    Raises:
        InputError: while recomputing, before any collective: a layer more than in the forward, another one, or an input
            of another shape. Also contexts that are used for a second region.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", for what is recomputed.

    Example:
        >>> import torch, syncbn
        >>> from torch.utils.checkpoint import checkpoint
        >>> region = torch.nn.Sequential(torch.nn.Linear(2, 3), syncbn.SyncBatchNorm(3), torch.nn.ReLU())
        >>> y = checkpoint(region, torch.randn(4, 2), use_reentrant=False, context_fn=syncbn.saved_statistics)
        >>> y.sum().backward()
    """
    saved: list[_Saved] = []
    forward, recomputation = within()
    return _Context(saved, forward, replays=False), _Context(saved, recomputation, replays=True)


class _Saved(NamedTuple):
    """What is kept of a layer's forward.

    Attributes:
        shape: of the input.
        buffer: address of the running statistics, which tells layers apart; 0 where it does not.
        total: `[Σx, Σx², N]` of all replicas.
    """

    shape: tuple[int, ...]
    buffer: int
    total: Tensor


class _Context(AbstractContextManager[None]):
    """One of the two; the one that replays may be entered again and again."""

    def __init__(self, saved: list[_Saved], within: AbstractContextManager[Any], *, replays: bool) -> None:
        self._saved = saved
        self._within = within
        self._replays = replays

    def __enter__(self) -> None:
        if self._saved and not self._replays:
            raise InputError("these statistics are of another region: pass context_fn=syncbn.saved_statistics itself")
        self._within.__enter__()
        entered.setdefault(threading.get_ident(), []).append(
            (self._saved, iter(self._saved) if self._replays else None)
        )

    def __exit__(self, *error: Any) -> bool | None:
        here = entered[threading.get_ident()]
        here.pop()
        if not here:
            del entered[threading.get_ident()]
        return self._within.__exit__(*error)


# By thread, the contexts that it is in, each with the part of its list that is still to be handed back. Empty, as one
# look tells, where nobody is in any.
entered: dict[int, list[tuple[list[_Saved], Iterator[_Saved] | None]]] = {}


@contextlib.contextmanager
def only(depth: int) -> Iterator[None]:
    """Be in the outermost `depth` of this thread's contexts alone."""
    here = entered.get(threading.get_ident(), [])
    aside = here[depth:]
    del here[depth:]
    try:
        yield
    finally:
        here.extend(aside)


def depth() -> int:
    """Return how many contexts this thread is in."""
    return len(entered.get(threading.get_ident(), ()))


def _here() -> Iterator[tuple[list[_Saved], Iterator[_Saved] | None]]:
    """Return the contexts of this thread, the innermost first."""
    return reversed(entered.get(threading.get_ident(), []))


def replayed(x: Tensor, running: Running | None) -> Tensor | None:
    """Return the total that this layer had in the forward which is repeated here, or None if none is.

    The innermost context that replays supplies it.

    Args:
        x: input (N, C, *) of the layer.
        running: its running statistics; None in compiled code, which may hand over intermediate values.
    """
    for saved, rest in _here():
        if rest is not None:
            return _next(saved, rest, x, running).total.clone()  # compiled code may write where it has read
    return None


def record(x: Tensor, running: Running | None, total: Tensor) -> None:
    """Keep a layer's total, new or replayed, for the contexts that record and are within the one that replays."""
    for saved, rest in _here():
        if rest is not None:
            break
        saved.append(_Saved(tuple(x.shape), _address(running), total.clone()))


def is_replayed() -> bool:
    """Tell whether `replayed` returns what was kept."""
    return bool(entered) and any(rest is not None for _, rest in _here())


def _next(saved: list[_Saved], rest: Iterator[_Saved], x: Tensor, running: Running | None) -> _Saved:
    found = next(rest, None)
    if found is None:
        what = f"after {len(saved)} of the forward"
    elif found.shape != tuple(x.shape):
        what = f"where the forward had {found.shape}"
    elif found.buffer != _address(running):
        what = "where the forward had another layer"
    else:
        return found
    raise InputError(
        f"a checkpointed region runs a SyncBatchNorm on input of shape {tuple(x.shape)} when it is recomputed, {what}: "
        "let it run the same layers each time, or checkpoint it without syncbn.saved_statistics"
    )


def _address(running: Running | None) -> int:
    """Return 0 where the statistics may be made for the call: those of a layer come with its count of batches."""
    return 0 if running is None or running.mean is None or running.batches is None else running.mean.data_ptr()
