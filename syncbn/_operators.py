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
from ._recomputation import is_repeatable
from ._statistics import Running, update_running
from .comm._groups import communicator

_library: Any = torch.library.Library("syncbn", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? batches, float eps, "
    "bool repeatable, str group) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor known, bool needs_x, str group) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float, group: str
) -> Tensor:
    """Do what `_autograd.sync_batch_norm` does, in operations that can be followed. `group` is the key of a group."""
    if torch._C._get_tracing_state() is None:  # the strides that `_forward_shapes` promises; torch.jit.trace needs none
        x = x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
    y, _, counted = torch.ops.syncbn.forward(
        x, weight, bias, running.mean, running.var, running.batches, eps, not torch.is_grad_enabled(), group
    )
    update_running(running, counted)
    return y  # type: ignore[no-any-return]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    eps: float,
    repeatable: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, `[mean, 1/√(σ²+ε), N]` and the total that moves the running statistics, which are only looked at."""
    check(x, weight, bias, mean, var)  # jit.trace cannot before
    running = Running(mean, var, batches)
    y, known, counted = _autograd.forward(
        x, weight, bias, running, eps, communicator(group), repeatable or is_repeatable(), move=False
    )
    return _like(x, y), known, counted


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, known: Tensor, needs_x: bool, group: str
) -> tuple[Tensor, Tensor]:
    """Return dx, empty unless `needs_x`, and this replica's `[Σdy, Σdy·x̂]`."""
    dx, share = _autograd.backward(dy, x, weight, known, communicator(group), needs_x, torch.float64)
    return x.new_empty(0) if dx is None else _like(x, dx), share


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the strides of `x`, which is what was promised."""
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    known, counted = (x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(x), known, counted


def _backward_shapes(
    dy: Tensor, x: Tensor, weight: Tensor | None, known: Tensor, needs_x: bool, group: str
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    return dx, x.new_empty(2 * x.shape[1], dtype=torch.float64)


class _Group:
    """A communicator that is looked up when it is used: nothing is, while a backward is traced."""

    def __init__(self, key: str) -> None:
        self.key = key

    def all_reduce(self, x: Tensor) -> Tensor:
        return communicator(self.key).all_reduce(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *_, eps, _, group = inputs
    ctx.mark_non_differentiable(*output[1:])
    _autograd.keep(ctx, x, weight, bias, output[1], eps, _Group(group))


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    def run(
        dy: Tensor, x: Tensor, weight: Tensor | None, known: Tensor, comm: _Group, needs_x: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.syncbn.backward(dy, x, weight, known, needs_x, comm.key)  # type: ignore[no-any-return]

    dx, dweight, dbias = _autograd.gradients(ctx, dy, run)
    return dx if ctx.needs_input_grad[0] else None, dweight, dbias, None, None, None, None, None, None


for _name, _run, _shapes in (("forward", _forward, _forward_shapes), ("backward", _backward, _backward_shapes)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{_name}", _shapes, lib=_library)
torch.library.register_autograd("syncbn::forward", _gradients, setup_context=_keep, lib=_library)
