"""The mathematics with its derivatives: kernels before and after each all-reduce, in one autograd.Function.

Both directions are generators: they yield what is to be summed over the replicas, are sent the sum, and return their
result. `alone` sees to that for one layer, `_joint` for several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from ._epilogue import Activation, Epilogue, tensors_of
from ._mask import finite_outside, flat_without_values
from ._names import Places, places_of
from ._recomputation import is_repeatable, once
from ._saved import entered, record, replayed
from ._statistics import Running, one_value, statistics, update_running
from .comm._place import Place
from .comm._protocol import BaseCommunicator
from .errors import InputError
from .kernels import _composed as composed
from .kernels import kernels_for

T = TypeVar("T")
Steps: TypeAlias = Generator[Tensor, Tensor, T]
Gradients: TypeAlias = tuple[Tensor | None, Tensor, Tensor | None]


def sync_batch_norm(
    x: Tensor,
    epilogue: Epilogue,
    running: Running,
    eps: float,
    comm: BaseCommunicator,
    mask: Tensor | None = None,
    name: str = "",
) -> Tensor:
    """Normalise `x` (N, C, *) with the moments of all replicas, and move the `running` statistics.

    A `mask` gives each value its weight w in the sums, see `functional.sync_batch_norm`. `name` is the layer's.

    For backward it keeps `x`, `weight` and 2C+1 numbers (mean, 1/√(σ²+ε), N), and with an activation `bias` and the
    residual; never the running statistics, so that those may move meanwhile.

    Collectives: one float64 all-reduce of 2C+1 numbers, `[Σwx, Σwx², Σw]`; in a backward that needs dx one of 2C,
    `[Σdz, Σdz·x̂]`; in the derivative of that, two more of 2C.
    """
    places = places_of(name, x.shape[1])
    if torch._C._are_functorch_transforms_active():
        y: Tensor = _Transformed.apply(x, *epilogue, mask, running, eps, comm, places)[0]  # type: ignore[no-untyped-call]
        return y
    return _SyncBatchNorm.apply(x, *epilogue, mask, running, eps, comm, places, is_repeatable())  # type: ignore[no-any-return, no-untyped-call]


def forward(
    x: Tensor,
    epilogue: Epilogue,
    running: Running,
    eps: float,
    comm: BaseCommunicator,
    repeatable: bool,
    mask: Tensor | None = None,
    *,
    move: bool = True,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Return y, `[mean, 1/√(σ²+ε), N]`, and the total that moves the `running` statistics (see `once`).

    Args:
        x: input (N, C, *).
        epilogue: what follows the normalisation.
        running: the running statistics.
        eps: added to the variance.
        comm: the replicas.
        repeatable: see `is_repeatable`.
        mask: the weights, (N, 1, *) or (N, *); None for 1.
        move: move the running statistics here, which costs next to nothing.
    """
    if comm.size == 1 and x.numel() == x.shape[1] and mask is None:  # known without asking the device
        raise one_value()
    kernels = kernels_for(x, *tensors_of(epilogue), *running[:3])
    known_by = running if move else None  # compiled code may hand over intermediate values
    total = replayed(x, known_by) if entered else None
    if total is None:
        total = yield kernels.moments(x) if mask is None else composed.moments(x, mask)
    if entered:
        record(x, known_by, total)
    counted = once(total, running, repeatable=repeatable)
    if mask is not None:
        total = flat_without_values(total)  # another tensor: the running statistics move by `counted`
    y, known = kernels.normalize(x, total, epilogue, eps, running if move and counted is total else None)
    if move and counted is not total:
        update_running(running, counted)
    return y, known, counted


def backward(
    dy: Tensor,
    x: Tensor,
    epilogue: Epilogue,
    mask: Tensor | None,
    known: Tensor,
    needs_x: bool,
    dtype: torch.dtype,
) -> Steps[Gradients]:
    """Return dx, or None unless `needs_x`, `[Σdz, Σdz·x̂]` of this replica alone, in `dtype`, and dz or None.

    dz is the gradient of weight·x̂ + bias + residual; None stands for dy, or says that nobody asked (no residual).

    Args:
        dy: gradient of the output, like `x`.
        x: input of the forward.
        epilogue: of the forward; a residual only with an activation.
        mask: of the forward.
        known: `[mean, 1/√(σ²+ε), N]` from the forward.
        needs_x: compute dx, which takes an all-reduce.
        dtype: of the sums, the gradients of bias and weight.
    """
    kernels = kernels_for(dy, x, *tensors_of(epilogue))
    if mask is not None:
        x = finite_outside(x, mask)
    sums, dz = kernels.backward_sums(dy, x, known, epilogue)
    if not needs_x:
        return None, sums.to(dtype), dz
    share = sums.clone() if dtype == sums.dtype else sums.to(dtype)  # the sum over the replicas may replace `sums`
    dy, epilogue = _before_activation(dy, dz, epilogue)
    sums = yield sums
    if mask is None:
        return kernels.backward_input(dy, x, known, epilogue, sums), share, dz
    return composed.backward_input(dy, x, known, epilogue, sums, mask), share, dz


def _before_activation(dy: Tensor, dz: Tensor | None, epilogue: Epilogue) -> tuple[Tensor, Epilogue]:
    """Return what `backward_input` takes: dz is what it would make of dy, where that was made already."""
    return (dy, epilogue) if dz is None else (dz, Epilogue(epilogue.weight, epilogue.bias))


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    epilogue: Epilogue,
    mask: Tensor | None,
    known: Tensor,
    comm: BaseCommunicator,
    place: Place,
    needs_x: bool,
    eps: float,
) -> Steps[Gradients]:
    """Do what `backward` does in operations that autograd differentiates, to any order.

    The statistics become functions of `x` again. Their values are known: the forward's all-reduce is not repeated.
    """
    mean, invstd, count = known.detach().tensor_split([x.shape[1], 2 * x.shape[1]])
    variance = invstd.reciprocal().square() - eps
    total = torch.cat([mean * count, (variance + mean.square()) * count])
    if mask is not None:
        x = finite_outside(x, mask)
        total = flat_without_values(torch.cat([total, count]))[:-1]
    sums = _AllReduce.apply(composed.moments(x, mask)[:-1], comm, place, total)  # type: ignore[no-untyped-call]
    known = statistics(torch.cat([sums, count]), eps)
    share, dz = composed.backward_sums(dy, x, known, epilogue)
    if not needs_x:
        return None, share, dz
    sums = yield share
    dy, epilogue = _before_activation(dy, dz, epilogue)
    return composed.backward_input(dy, x, known, epilogue, sums, mask), share, dz


def alone(steps: Steps[T], comm: BaseCommunicator, place: Place) -> T:
    """Take one layer's `steps`, each sum a collective of its own, and return their result."""
    try:
        payload = next(steps)
        while True:
            payload = steps.send(all_reduce(payload, comm, place))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def all_reduce(payload: Tensor, comm: BaseCommunicator, place: Place) -> Tensor:
    """Return the sum of `payload` over the replicas; differentiable where the payload is."""
    if payload.requires_grad:
        return _AllReduce.apply(payload, comm, place, None)  # type: ignore[no-any-return, no-untyped-call]
    return comm.all_reduce(payload, place)


class _AllReduce(torch.autograd.Function):
    """The sum of a vector over the replicas, or its `known` value.

    It is its own adjoint: with S = Σ_r s_r on every replica, dL/ds_r = Σ_q dL_q/dS.
    """

    @staticmethod
    def forward(vector: Tensor, comm: BaseCommunicator, place: Place, known: Tensor | None) -> Tensor:
        return comm.all_reduce(vector.clone(), place) if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, BaseCommunicator, Place, Tensor | None], output: Tensor) -> None:
        _, ctx.comm, ctx.place, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sums = _AllReduce.apply(grad.contiguous(), ctx.comm, ctx.place, None)  # type: ignore[no-untyped-call]
        return sums, None, None, None


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: Activation | None,
        mask: Tensor | None,
        running: Running,
        eps: float,
        comm: BaseCommunicator,
        places: Places,
        repeatable: bool,
    ) -> Tensor:
        epilogue = Epilogue(weight, bias, residual, activation)
        y, known, _ = alone(forward(x, epilogue, running, eps, comm, repeatable, mask), comm, places.forward)
        keep(ctx, x, epilogue, mask, known, eps, comm, places)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*alone(gradients(ctx, dy), ctx.comm, ctx.places.backward), *[None] * 7)


class _Transformed(torch.autograd.Function):
    """The same in the form that torch.func.grad takes: twice as dear, as an output more passes through autograd."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: Activation | None,
        mask: Tensor | None,
        running: Running,
        eps: float,
        comm: BaseCommunicator,
        places: Places,
    ) -> tuple[Tensor, Tensor]:
        epilogue = Epilogue(weight, bias, residual, activation)
        return alone(forward(x, epilogue, running, eps, comm, is_repeatable(), mask), comm, places.forward)[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *epilogue, mask, _, eps, comm, places = inputs
        ctx.mark_non_differentiable(output[1])
        keep(ctx, x, Epilogue(*epilogue), mask, output[1], eps, comm, places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return (*alone(gradients(ctx, dy), ctx.comm, ctx.places.backward), *[None] * 6)


def keep(
    ctx: Any,
    x: Tensor,
    epilogue: Epilogue,
    mask: Tensor | None,
    known: Tensor,
    eps: float,
    comm: Any,
    places: Places,
) -> None:
    """Keep for backward what `gradients` needs: `x`, `weight`, the `mask` and `[mean, 1/√(σ²+ε), N]`.

    With an activation also what else z is made of. y would do for relu in the residual's place, but is no smaller.
    """
    weight, bias, residual, activation = epilogue
    ctx.bias_dtype = None if bias is None else bias.dtype
    if activation is None:
        bias = residual = None
    ctx.save_for_backward(x, known, weight, bias, residual, mask)
    ctx.activation, ctx.eps, ctx.comm, ctx.places = activation, eps, comm, places
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, dy: Tensor | None, run: Callable[..., Steps[Gradients]] = backward
) -> Steps[tuple[Tensor | None, ...]]:
    """Return the gradients of x, weight, bias and residual from what `keep` kept; `run` does what `backward` does."""
    x, known, weight, bias, residual, mask = ctx.saved_tensors
    epilogue = Epilogue(weight, bias, residual, ctx.activation)
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    if dy is None:
        dy = torch.zeros_like(x)  # the peers' collective waits for this rank all the same
    if is_legacy_batchedtensor(dy) or is_batchedtensor(dy):
        raise InputError("SyncBatchNorm's backward takes one gradient at a time: is_grads_batched=True cannot be used")
    if torch.is_grad_enabled():
        derivative = ctx.places.derivative
        steps = differentiable_backward(dy, x, epilogue, mask, known, ctx.comm, derivative, needs_x, ctx.eps)
    else:
        dtypes = {None if weight is None else weight.dtype, ctx.bias_dtype} - {None}
        dtype = dtypes.pop() if len(dtypes) == 1 else known.dtype
        steps = run(dy, x, epilogue, mask, known, needs_x, dtype)
    dx, share, dz = yield from steps
    dbias, dweight = share.chunk(2)  # this replica's share, on purpose: the trainer reduces parameters' gradients
    return (
        dx,
        _to(dweight, weight.dtype) if needs_weight else None,
        _to(dbias, ctx.bias_dtype) if needs_bias else None,
        (dy if dz is None else dz) if needs_residual else None,
    )


def _to(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient if gradient.dtype == dtype else gradient.to(dtype)
