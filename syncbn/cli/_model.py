"""`verify --model`: a user's model over all ranks against the same model on the whole batch."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree

from syncbn import broadcast_parameters, convert_sync_batchnorm
from syncbn.comm import Communicator
from syncbn.errors import InputError

from ._comparison import Row, error_of, over_ranks

BOUND = 1e-9  # float64 through a whole model: 16 real ones stay within 5e-12


class Outcome(NamedTuple):
    """What one forward and backward yields."""

    outputs: list[Tensor]
    input_gradients: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def verify_model(spec: str, sample: Sequence[int] | None, comm: Communicator, device: str) -> list[Row]:
    """Compare the model that `spec` makes. Every rank returns the same.

    Raises:
        InputError: there is no such factory, no input, nothing to compare, or the model is random.
    """
    model, inputs, counts = _prepare(spec, sample, comm, device)
    start = sum(counts[: comm.rank])
    mine = slice(start, start + counts[comm.rank])
    whole, again = (_train(copy.deepcopy(model), inputs, slice(None)) for _ in range(2))
    _refuse_random(whole, again)
    ours = _train(convert_sync_batchnorm(copy.deepcopy(model), comm), inputs, mine)
    rows = [
        *(
            Row("outputs", f"output {i}", error_of(a, e[mine]), BOUND)
            for i, (a, e) in _pairs(ours.outputs, whole.outputs)
        ),
        *(
            Row("input gradients", f"input {i}", error_of(a, e[mine]), BOUND)
            for i, (a, e) in _pairs(ours.input_gradients, whole.input_gradients)
        ),
        *_gradient_rows(ours, whole, comm),
        *(Row("buffers", name, error_of(ours.buffers[name], value), BOUND) for name, value in whole.buffers.items()),
    ]
    if comm.size > 1:
        local = _train(copy.deepcopy(model), inputs, mine)
        errors = [error_of(a, e[mine]) for _, (a, e) in _pairs(local.outputs, whole.outputs)]
        rows.append(Row("control: not converted", "outputs", max(errors), BOUND, control=True))
    return _worst(over_ranks(rows, comm))


def _pairs(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Any:
    return enumerate(zip(ours, expected, strict=True))


def _prepare(
    spec: str, sample: Sequence[int] | None, comm: Communicator, device: str
) -> tuple[nn.Module, list[Tensor], list[int]]:
    """Return the model, in float64 and with rank 0's parameters, the inputs of all ranks, and the ranks' samples."""
    counts = [2 + rank % 2 for rank in range(comm.size)]
    name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(name)
        factory = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--model {spec}: expected package.module:factory that can be imported here: {error}"
        ) from error
    torch.manual_seed(0)
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {spec}: expected the factory to return a module, got {type(model).__name__}")
    inputs = _inputs(module, sample, sum(counts))
    state = nn.Module()
    state.model = model.to(device).double()
    for i, x in enumerate(inputs):
        state.register_buffer(f"input{i}", x.to(device, torch.float64 if x.is_floating_point() else x.dtype))
    if not any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise InputError(f"--model {spec}: the model has no BatchNorm layer in training mode: nothing to compare")
    for m in model.modules():
        if isinstance(m, _DropoutNd):
            m.eval()
    broadcast_parameters(state, process_group=comm)  # a factory may draw from another generator than torch's
    return model, [getattr(state, f"input{i}") for i in range(len(inputs))], counts


def _inputs(module: Any, sample: Sequence[int] | None, samples: int) -> list[Tensor]:
    if sample is not None:
        return [
            torch.randn(samples, *sample, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        ]
    example = getattr(module, "example_inputs", None)
    if example is None:
        raise InputError(
            f"no input: give the shape of one sample, as --input 3,64,64, or {module.__name__} a function "
            "example_inputs(n) that returns a tensor or a tuple of tensors with n samples in dimension 0"
        )
    given = example(samples)
    inputs = [given] if isinstance(given, Tensor) else list(given)
    for x in inputs:
        if not isinstance(x, Tensor) or x.shape[:1] != (samples,):
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"example_inputs({samples}): expected tensors of {samples} samples, got {came}")
    return inputs


def _train(model: nn.Module, inputs: Sequence[Tensor], part: slice) -> Outcome:
    """Run forward and backward on some of the samples; dy is random, and the same for the same sample."""
    xs = [x[part].detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    leaves = [y for y in _pytree.tree_leaves(model(*xs)) if isinstance(y, Tensor) and y.is_floating_point()]
    for y in leaves:
        if y.shape[:1] != xs[0].shape[:1]:
            raise InputError(
                f"an output of shape {tuple(y.shape)} for {len(xs[0])} samples: its parts cannot be compared; let the "
                "factory return a model whose outputs have the samples in dimension 0"
            )
    generator = torch.Generator().manual_seed(1)
    shapes = [(len(inputs[0]), *y.shape[1:]) for y in leaves]
    gs = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")[part] for shape in shapes]
    with_grad = [(y, g.to(y)) for y, g in zip(leaves, gs, strict=True) if y.requires_grad]
    if not with_grad:
        raise InputError("no floating-point output of the model requires grad: nothing to compare")
    torch.autograd.backward([y for y, _ in with_grad], [g for _, g in with_grad])
    return Outcome(
        [y.detach() for y in leaves],
        [x.grad for x in xs if x.grad is not None],
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        dict(model.named_buffers()),
    )


def _refuse_random(whole: Outcome, again: Outcome) -> None:
    difference = max(error_of(a, e) for _, (a, e) in _pairs(again.outputs, whole.outputs))
    if not difference <= BOUND / 10:
        raise InputError(
            f"the model is random in training: two runs of the same batch differ by {difference:.1e}. Let the factory "
            "turn that off (functional dropout, stochastic depth, noise): the ranks cannot draw what one process draws"
        )


def _gradient_rows(ours: Outcome, whole: Outcome, comm: Communicator) -> list[Row]:
    """Sum over the ranks. Relative to the largest gradient of all: a bias before a norm layer has only rounding."""
    names = list(whole.gradients)
    mine = [ours.gradients.get(name, torch.zeros_like(whole.gradients[name])) for name in names]
    sums = comm.all_reduce(torch.cat([gradient.double().flatten().cpu() for gradient in mine]))
    scale = max(gradient.abs().max().item() for gradient in whole.gradients.values())
    parts = torch.split(sums, [gradient.numel() for gradient in mine])
    return [
        Row(
            "parameter gradients",
            name,
            error_of(part.view_as(whole.gradients[name]), whole.gradients[name], scale),
            BOUND,
        )
        for name, part in zip(names, parts, strict=True)
    ]


def _worst(rows: Sequence[Row]) -> list[Row]:
    """Keep of each kind the row with the largest error."""
    kinds = dict.fromkeys(row.case for row in rows)
    return [max((row for row in rows if row.case == kind), key=Row.part_of_bound) for kind in kinds]
