"""The layer as registered operations: what torch.compile, torch.jit.trace, fake tensors and dispatch modes see of it.

To them an operation is opaque. When it runs, it does what the eager layer does: the same kernels, the same
communicator, the same numbers sent. So ranks on different paths meet, and a group is looked up when it is needed, not
in a trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd
from ._checks import check
from ._epilogue import Activation, Epilogue, tensors_of
from ._names import Places, places_of, text_of
from ._recomputation import is_repeatable, once
from ._statistics import Running, update_running
from .comm._groups import communicator
from .comm._place import Place

_EPILOGUE = "Tensor? weight, Tensor? bias, Tensor? residual, str activation, float slope"  # see `_flat`
_NAME = "str name, Tensor? number"  # of the layer: one of the two, see `_names.Name`
_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # a graph that is replayed would count no calls
    _TAGS.append(torch.Tag.cudagraph_unsafe)
_library: Any = torch.library.Library("syncbn", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"forward(Tensor x, {_EPILOGUE}, Tensor? mask, Tensor? mean, Tensor? var, Tensor? batches, float eps, str group,"
    f" {_NAME})"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "counted(Tensor total, Tensor? mean, Tensor? var, Tensor? batches, bool repeatable) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"backward(Tensor dy, Tensor x, {_EPILOGUE}, Tensor? mask, Tensor known, bool needs_x, str group, {_NAME})"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def sync_batch_norm(
    x: Tensor,
    epilogue: Epilogue,
    running: Running,
    eps: float,
    group: str,
    mask: Tensor | None = None,
    name: str | Tensor = "",
) -> Tensor:
    """Do what `_autograd.sync_batch_norm` does, in operations that can be followed. `group` is the key of a group."""
    if torch._C._get_tracing_state() is None:  # the strides that `_forward_shapes` promises; torch.jit.trace needs none
        x = x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
    named = (name, None) if isinstance(name, str) else ("", name)
    buffers = running.mean, running.var, running.batches  # the compiler of torch 2.8 knows no slice of a named tuple
    y, _, total = torch.ops.syncbn.forward(x, *_flat(epilogue), mask, *buffers, eps, group, *named)
    repeatable = not torch.is_grad_enabled()
    update_running(running, torch.ops.syncbn.counted(total, *buffers, repeatable))
    return y  # type: ignore[no-any-return]


def _flat(epilogue: Epilogue) -> tuple[Any, ...]:
    """Return what a schema can hold of it: no activation is one without a name."""
    return *tensors_of(epilogue), *(epilogue.activation or ("", 0.0))


def _epilogue(*flat: Any) -> Epilogue:
    """Undo `_flat`."""
    weight, bias, residual, name, slope = flat
    return Epilogue(weight, bias, residual, Activation(name, slope) if name else None)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    eps: float,
    group: str,
    name: str,
    number: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, `[mean, 1/√(σ²+ε), N]` and `[Σx, Σx², N]`; the running statistics are only looked at."""
    epilogue = _epilogue(weight, bias, residual, activation, slope)
    check(x, epilogue, mean, var, mask)  # jit.trace cannot before
    running = Running(mean, var, batches)
    comm = communicator(group)
    steps = _autograd.forward(x, epilogue, running, eps, comm, False, mask, move=False)
    y, known, total = _autograd.alone(steps, comm, _places(name, number, x).forward)
    return _like(x, y), known, total


def _counted(
    total: Tensor, mean: Tensor | None, var: Tensor | None, batches: Tensor | None, repeatable: bool
) -> Tensor:
    """Return what moves the running statistics, see `once`: for itself, as selective checkpointing may keep a total."""
    counted = once(total, Running(mean, var, batches), repeatable=repeatable or is_repeatable())
    return counted.clone() if counted is total else counted


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    mask: Tensor | None,
    known: Tensor,
    needs_x: bool,
    group: str,
    name: str,
    number: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, empty unless `needs_x`, this replica's `[Σdz, Σdz·x̂]`, and dz, empty unless `_has_dz`."""
    epilogue = _epilogue(weight, bias, residual, activation, slope)
    steps = _autograd.backward(dy, x, epilogue, mask, known, needs_x, torch.float64)
    dx, share, dz = _autograd.alone(steps, communicator(group), _places(name, number, x).backward)
    nothing = x.new_empty(0)
    return (
        nothing if dx is None else _like(x, dx),
        share,
        nothing if dz is None or not _has_dz(epilogue) else _like(x, dz),
    )


def _places(name: str, number: Tensor | None, x: Tensor) -> Places:
    return places_of(name if number is None else text_of(number), x.shape[1])


def _has_dz(epilogue: Epilogue) -> bool:
    """Tell whether the residual's gradient differs from dy."""
    return epilogue.residual is not None and epilogue.activation is not None


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the strides of `x`, which is what was promised."""
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    known, total = (x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), known, total


def _counted_shapes(total: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(total)


def _backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *flat, _, _, needs_x, _, _, _ = others
    dx, dz = (torch.empty_like(x) if needed else x.new_empty(0) for needed in (needs_x, _has_dz(_epilogue(*flat))))
    return dx, x.new_empty(2 * x.shape[1], dtype=torch.float64), dz


class _Group:
    """A communicator that is looked up when it is used: nothing is, while a backward is traced."""

    def __init__(self, key: str) -> None:
        self.key = key

    def all_reduce(self, x: Tensor, place: Place) -> Tensor:
        return communicator(self.key).all_reduce(x, place)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *flat, mask = inputs[:7]
    *_, eps, group, name, number = inputs
    ctx.mark_non_differentiable(*output[1:])
    channels = x.shape[1]  # symbolic in a trace, where nothing is summed
    places = places_of(name, channels if isinstance(channels, int) else 0)
    _autograd.keep(ctx, x, _epilogue(*flat), mask, output[1], eps, _Group(group), places)
    ctx.named = name, number


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    def run(
        dy: Tensor,
        x: Tensor,
        epilogue: Epilogue,
        mask: Tensor | None,
        known: Tensor,
        needs_x: bool,
        dtype: torch.dtype,
    ) -> _autograd.Steps[_autograd.Gradients]:
        yield from ()  # the operation sums by itself
        dx, share, dz = torch.ops.syncbn.backward(
            dy, x, *_flat(epilogue), mask, known, needs_x, ctx.comm.key, *ctx.named
        )
        return dx, share, dz if _has_dz(epilogue) else None

    dx, *others = _autograd.alone(_autograd.gradients(ctx, dy, run), ctx.comm, ctx.places.backward)
    return dx if ctx.needs_input_grad[0] else None, *others, *[None] * 10


for _name, _run, _shapes in (
    ("forward", _forward, _forward_shapes),
    ("counted", _counted, _counted_shapes),
    ("backward", _backward, _backward_shapes),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{_name}", _shapes, lib=_library)
torch.library.register_autograd("syncbn::forward", _gradients, setup_context=_keep, lib=_library)
