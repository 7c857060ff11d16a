"""Several layers in one autograd.Function: one all-reduce for the sums of all of them, each way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import Steps, T, all_reduce, forward, gradients, keep, sync_batch_norm
from ._epilogue import Epilogue, tensors_of
from ._names import Places, places_of_several
from ._recomputation import is_repeatable
from ._statistics import Running
from .comm._place import Place
from .comm._protocol import BaseCommunicator


class Call(NamedTuple):
    """What one layer is asked: the arguments of `sync_batch_norm` but for the communicator."""

    x: Tensor
    epilogue: Epilogue
    running: Running
    eps: float
    mask: Tensor | None = None
    name: str = ""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Input, weight, bias and residual: what may need a gradient."""
        return self.x, *tensors_of(self.epilogue)


def sync_batch_norms(calls: Sequence[Call], comm: BaseCommunicator) -> list[Tensor]:
    """Do what `sync_batch_norm` does for each of `calls`, none of which needs the result of another, in their order.

    An output without a gradient counts as one with zeros, as long as another one has a gradient.

    Collectives: one float64 all-reduce of Σ(2C+1) numbers; in the backward one of Σ2C over the inputs that need a
    gradient; in the derivative of that, one of each layer, and more of Σ2C.
    """
    if len(calls) == 1:
        x, epilogue, running, eps, mask, name = calls[0]
        return [sync_batch_norm(x, epilogue, running, eps, comm, mask, name)]
    tensors = chain.from_iterable(call.tensors for call in calls)
    places = places_of_several(tuple((call.name, call.x.shape[1]) for call in calls))
    return list(_SyncBatchNorms.apply(calls, comm, places, is_repeatable(), *tensors))  # type: ignore[no-untyped-call]


def _jointly(each: Sequence[Steps[T]], comm: BaseCommunicator, place: Place) -> list[T]:
    """Do for several layers what `alone` does for one. Each asks for one sum, or none."""
    results: dict[int, T] = {}
    payloads: dict[int, Tensor] = {}
    for number, steps in enumerate(each):
        try:
            payloads[number] = next(steps)
        except StopIteration as end:
            results[number] = end.value
    if payloads:
        total = all_reduce(torch.cat(list(payloads.values())), comm, place)
        parts = torch.split(total, [payload.numel() for payload in payloads.values()])
        for number, part in zip(payloads, parts, strict=True):
            try:
                each[number].send(part)
            except StopIteration as end:
                results[number] = end.value
    return [results[number] for number in range(len(each))]


class _Layer:
    """One layer's part of the function's ctx: what `keep` writes and `gradients` reads."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """It is the function's to set."""

    def taken(self) -> tuple[Tensor | None, ...]:
        """Return what is to be saved, and forget it: only autograd may hold it."""
        tensors = self.saved_tensors
        del self.saved_tensors
        return tensors

    def filled(self, tensors: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> _Layer:
        """Return a copy with what was saved: the backward may come again."""
        copy = _Layer()
        vars(copy).update(vars(self), saved_tensors=tensors, needs_input_grad=needs)
        return copy


_INPUTS, _KEPT = 4, 6  # tensors of each layer: what it takes, and what `keep` keeps


class _SyncBatchNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        calls: Sequence[Call],
        comm: BaseCommunicator,
        places: Places,
        repeatable: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`tensors` are those of `calls`, for autograd to see."""
        each = [forward(*call[:4], comm, repeatable, call.mask) for call in calls]
        results = _jointly(each, comm, places.forward)
        ctx.layers, ctx.comm, ctx.places = [_Layer() for _ in calls], comm, places
        for layer, call, (_, known, _) in zip(ctx.layers, calls, results, strict=True):
            keep(layer, call.x, call.epilogue, call.mask, known, call.eps, comm, places)
        ctx.save_for_backward(*chain.from_iterable(layer.taken() for layer in ctx.layers))
        ctx.set_materialize_grads(False)
        return tuple(y for y, _, _ in results)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
        layers = [
            layer.filled(kept[_KEPT * n : _KEPT * (n + 1)], needs[_INPUTS * n : _INPUTS * (n + 1)])
            for n, layer in enumerate(ctx.layers)
        ]
        each = [gradients(layer, dy) for layer, dy in zip(layers, dys, strict=True)]
        return (*[None] * 4, *chain.from_iterable(_jointly(each, ctx.comm, ctx.places.backward)))
