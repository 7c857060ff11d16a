"""Running statistics after training: measured anew, or put together from those of the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._alike import Named, check_alike, check_plain, device_of, facts_of
from ._checks import check
from ._epilogue import Epilogue
from ._layer import Synchronised
from ._own_forward import BatchNormCall, CatchBatchNorm, has_own_forward
from ._pending import finish
from ._statistics import mean_and_variance, unbiased
from .comm._groups import ProcessGroup, resolve
from .comm._place import place
from .comm._protocol import BaseCommunicator
from .errors import InputError
from .functional import train
from .kernels import _composed as composed
from .kernels import kernels_for


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    process_group: ProcessGroup = None,
) -> None:
    r"""Give batch norm layers the mean and variance of all values of all batches of all ranks: "precise batch norm".

    For each layer, with sums over everything that it was given in these forwards::

        N = Σ n      running_mean ← μ = Σx / N      running_var ← (Σx²/N - μ²)·N/(N-1)

    The moving average that training leaves remembers the last few batches, normalised by weights that have changed
    since. This has no memory, and no batch counts for more than its values: the sums are float64, so that it does not
    matter how samples are spread over batches and ranks. That holds for the first norm layer of a model exactly; the
    input of a later one was normalised with the statistics of its batch, as in training, and so depends on the batches.

    Values that a layer is told to leave out (`mask=`) are left out here, too.

    It takes the layers in training mode that keep running statistics, ours and torch's own, synchronised or not;
    frozen ones, in eval mode, stay as they are, and so does a layer that no batch reaches. Call `model.train()` first;
    it puts dropout in training mode, too. Nothing else changes: parameters, gradients, modes, momentum, and
    `num_batches_tracked`, which counts steps of training. After an error the running statistics are what they were.

    Args:
        model: of the same structure on every rank; DDP or torch.compile may be around it, which then runs eagerly.
        batches: as many on every rank (an empty one will do), each given to `forward`; may be a generator. Of a loader
            of pairs: `(x for x, _ in loader)`.
        forward: called with each batch, without gradients; `model` itself unless told otherwise. Not compiled.
        process_group: the ranks, see `SyncBatchNorm`.

    Raises:
        InputError: the layers or their modes differ between ranks, all are in eval mode, a rank has fewer batches than
            another, a layer was given anything but `(N, C, *)`, none was run, or a forward of its own does not say
            which values are normalised: it calls neither `super().forward` nor `F.batch_norm` with its running
            statistics.
        DTypeError: running statistics, or inputs of layers, are not plain tensors (DTensors).

    Collectives: one of 3P numbers among P ranks, one of P before each batch and at the end, those of the forwards, and
    one of the 2C+1 numbers of all layers.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; there the variances of equally large
    batches are averaged with the squares of their means, which is the same. fvcore's differ between ranks (fvcore#152).

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> recompute_statistics(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0], [9.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([5.]), tensor([10.]))
    """
    comm = resolve(process_group)
    tracking = layers_of(model)
    device = _check(tracking, comm, [f"{name}: {_kind(layer)}" for name, layer in tracking.items()])
    layers = {name: layer for name, layer in tracking.items() if layer.training}
    if tracking and not layers:
        raise InputError(
            "every batch norm layer is in eval mode, where statistics are frozen: call model.train() first"
        )
    sums = [layer.running_mean.new_zeros(2 * layer.num_features + 1, dtype=torch.float64) for layer in layers.values()]
    before = [(buffer, buffer.clone()) for _, buffer in buffers_of(layers)]
    measure = _Measure()
    hooks = []
    for layer, into in zip(layers.values(), sums, strict=True):
        own = has_own_forward(type(layer))
        hook = measure.expect(layer, into) if own else partial(_add_input, into)
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with _eagerly(model), measure if measure.sums else nullcontext():
            for batch in _in_step(batches, comm, device):
                (forward or model)(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in before:
            buffer.copy_(value)
    measure.check(layers)
    totals = _sum(sums, comm, device)
    if layers and not any(total[-1] for total in totals):
        raise InputError("no batch norm layer was run: pass batches, and a `forward` that is not compiled")
    for layer, total in zip(layers.values(), totals, strict=True):
        if total[-1] > 0:
            mean, variance = mean_and_variance(total)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(unbiased(variance, total[-1]))


@torch.no_grad()
def synchronize_statistics(model: nn.Module, *, process_group: ProcessGroup = None) -> None:
    r"""Give every rank the running statistics of all ranks' data, where each has kept those of its own, in place.

    For models trained with local batch norm, or with statistics of a node: the ranks' weights are equal then, their
    running statistics are not, and rank 0's, which are saved, describe one rank's samples. By the law of total
    variance, over P ranks that count equally::

        running_mean ← μ = Σ running_mean / P      running_var ← Σ (running_var + running_mean²) / P - μ²

    `num_batches_tracked` becomes the mean as well, rounded. Every batch norm layer that keeps running statistics takes
    part, ours and torch's own, in any mode. Where the ranks agree already nothing changes but a rounding in float64.
    The moving averages of training come out; `recompute_statistics` measures anew.

    Args:
        model: of the same structure on every rank.
        process_group: the ranks, see `SyncBatchNorm`.

    Raises:
        InputError, DTypeError: the layers differ between ranks, or running statistics are not plain tensors; on every
            rank, before anything has changed.

    Collectives: one of 3P numbers among P ranks, and one of the 2C+1 numbers, and another, of all layers.

    Source: pytorch#30718, which asks for it.

    Example:
        >>> synchronize_statistics(nn.BatchNorm1d(3))  # alone: as it was
    """
    comm = resolve(process_group)
    layers = layers_of(model)
    device = _check(layers, comm)
    totals = _sum([_as_sums(layer) for layer in layers.values()], comm, device)
    for layer, total in zip(layers.values(), totals, strict=True):
        mean, variance = mean_and_variance(total[:-1])
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_((total[-1] / comm.size).round())


# The layers and their buffers


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return the batch norm layers that keep running statistics, by name; compiled or not, the same."""
    return {
        f"{name}.".replace("_orig_mod.", "").removesuffix("."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.track_running_stats
        and layer.running_mean is not None
        and layer.running_var is not None
    }


def buffers_of(layers: Mapping[str, nn.Module]) -> Named:
    """Return their running statistics and counts of batches, by name."""
    named = [(f"{name}.{key}", getattr(layer, key)) for name, layer in layers.items() for key in _BUFFERS]
    return [(name.removeprefix("."), buffer) for name, buffer in named if buffer is not None]


def _kind(layer: nn.Module) -> str:
    synchronised = "synchronised" if isinstance(layer, Synchronised) else "not synchronised"
    return f"{synchronised}, in {'training' if layer.training else 'eval'} mode"


def _check(layers: Mapping[str, nn.Module], comm: BaseCommunicator, kinds: Sequence[str] = ()) -> torch.device:
    """Refuse layers that differ between ranks or cannot be sent; return the device on which the ranks speak."""
    named = buffers_of(layers)
    check_alike([*facts_of(named), *kinds], comm, WHAT, device_of(named))
    check_plain(named)
    return device_of(named)


WHAT = "batch norm layers"
_PLACE = place("running statistics")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


# Sums


def _sum(vectors: Sequence[Tensor], comm: BaseCommunicator, device: torch.device) -> Sequence[Tensor]:
    """Return the sums of float64 vectors over the ranks; one all-reduce."""
    if not vectors:
        return []
    flat = torch.cat([vector.to(device) for vector in vectors])
    return torch.split(comm.all_reduce(flat, _PLACE), [len(vector) for vector in vectors])


def _add_input(sums: Tensor, layer: Any, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
    """Add `[Σx, Σx², n]` of a layer's input, before its forward."""
    _add(sums, args[0] if args else kwargs["input"], layer.running_mean, kwargs.get("mask"))


def _add(sums: Tensor, x: Tensor, mean: Tensor, mask: Tensor | None) -> None:
    finish((x, mask))
    check(x, Epilogue(), mean, mean, mask)
    sums.add_(kernels_for(x).moments(x) if mask is None else composed.moments(x, mask))


class _Measure(CatchBatchNorm):
    """Adds up what layers with a forward of their own normalise, where they do."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, Tensor] = {}  # by the id of a layer's running mean
        self._run: set[int] = set()
        self._measured: set[int] = set()

    def expect(self, layer: Any, sums: Tensor) -> Callable[..., None]:
        """Measure `layer`; the result is to be called before its forward."""
        self.sums[id(layer.running_mean)] = sums
        return lambda layer, *_: self._run.add(id(layer.running_mean))

    def note(self, func: Any, args: tuple[Any, ...]) -> None:
        """Measure a layer of ours."""
        if func is train:
            x, _, running, _, _, mask, _ = args
            self._add(x, running.mean, mask)

    def batch_norm(self, call: BatchNormCall) -> Tensor:
        """Measure a layer of torch's."""
        self._add(call.input, call.running_mean, None)
        return super().batch_norm(call)

    def _add(self, x: Tensor, mean: Tensor | None, mask: Tensor | None) -> None:
        if mean is not None and id(mean) in self.sums:
            _add(self.sums[id(mean)], x, mean, mask)
            self._measured.add(id(mean))

    def check(self, layers: Mapping[str, Any]) -> None:
        """Refuse layers that were run and not measured."""
        for name, layer in layers.items():
            if id(layer.running_mean) in self._run - self._measured:
                raise InputError(
                    f"{name or 'the model'}, a {type(layer).__name__} with a forward of its own, calls neither "
                    "super().forward nor F.batch_norm with its running statistics: put it into eval mode to leave it "
                    "out"
                )


def _as_sums(layer: Any) -> Tensor:
    """Return `[Σx, Σx², n]` of one value for a rank with these running statistics, and num_batches_tracked."""
    mean, variance = layer.running_mean.double(), layer.running_var.double()
    tracked = 0 if layer.num_batches_tracked is None else layer.num_batches_tracked
    return torch.cat([mean, variance + mean.square(), mean.new_tensor([1, tracked])])


# The forwards


def _in_step(batches: Iterable[Any], comm: BaseCommunicator, device: torch.device) -> Iterator[Any]:
    """Yield the batches for as long as every rank has one."""
    end = object()
    iterator = iter(batches)
    for number in itertools.count():
        batch = next(iterator, end)
        there = torch.zeros(comm.size, dtype=torch.float64, device=device)
        there[comm.rank] = batch is not end
        there = comm.all_reduce(there, _PLACE)
        if not there.any():
            return
        if not there.all():
            ended = [rank for rank, has_one in enumerate(there.tolist()) if not has_one]
            raise InputError(
                f"expected as many batches on every rank, got {number} on rank {', '.join(map(str, ended))} and more "
                "on the others: give each as many; an empty one takes part without weight"
            )
        yield batch


def _eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Run what is compiled in `model` as it was written: compiled code would not see a new hook."""
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
