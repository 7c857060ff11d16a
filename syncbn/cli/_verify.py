"""`syncbn verify`: the layer over all ranks against the whole batch in one process, in float64."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from syncbn._launcher import Launch, detect
from syncbn.comm import Communicator
from syncbn.errors import LaunchError, SyncBatchNormError
from syncbn.kernels import kernels_for

from ._comparison import Row, error_of, over_ranks
from ._job import Deadline, end, join, plural, table
from ._model import verify_model

CHANNELS, PIXELS = 16, (5, 7)
EPS, MOMENTUM = 1e-5, 0.1
SHOWN = 10  # failures that are spelled out

# What rounding to the dtype costs, with a margin of a few units in the last place.
DTYPES = {
    "float64": (torch.float64, 1e-12),
    "float32": (torch.float32, 2e-6),
    "bfloat16": (torch.bfloat16, 2e-2),
    "float16": (torch.float16, 3e-3),
}
LAYOUTS = ("contiguous", "channels_last", "(N, C)")
SHARES: dict[str, Callable[[int], list[int]]] = {
    "equal": lambda size: [4] * size,
    "unequal": lambda size: [2 + 3 * (rank % 3) for rank in range(size)],
    "one empty": lambda size: [4] * (size - 1) + [0],
}
QUANTITIES = {
    "forward": ("y",),
    "backward": ("dx", "dweight", "dbias"),
    "statistics": ("running_mean", "running_var"),
}


@dataclass(frozen=True)
class Case:
    """One comparison: dtype of x, y and their gradients; layout; samples by rank; whether a SiLU is fused."""

    dtype: str
    layout: str
    shares: str
    silu: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} {self.shares}{' + silu' if self.silu else ''}"

    def parameter_dtype(self) -> str:
        """Half precision comes with float32 parameters and buffers."""
        return "float64" if self.dtype == "float64" else "float32"

    def bound(self, quantity: str) -> float:
        """Return how large the error may be: by the dtype that the quantity has, sums over the batch a little more."""
        if quantity in ("y", "dx"):
            return DTYPES[self.dtype][1]
        return (5 if quantity in ("dweight", "dbias") else 1) * DTYPES[self.parameter_dtype()][1]


def add_command(commands: Any) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser(
        "verify",
        help="compare the layer, or your model, over all ranks with the whole batch in one process",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Start it alone or under torchrun, mpirun, horovodrun or srun, on the hosts and devices that you train on. Compares
SyncBatchNorm over all ranks with F.batch_norm in float64 on the concatenation of their batches: outputs, gradients and
running statistics, over dtypes, layouts, and ranks with equal, unequal and empty shares. Errors are relative to the
largest value of the reference (at least 1), the maximum over all ranks. A control, nn.BatchNorm2d without
synchronisation, must be beyond the bound. The exit status is 0 if every error is within its bound.

--model package.module:factory checks a model of yours instead. factory() returns the model as you train it, in training
mode. In float64, a copy converted by convert_sync_batchnorm runs on this rank's 2 or 3 samples, the unconverted model
on all ranks' samples; outputs, input gradients, parameter gradients (summed over the ranks) and buffers are compared.
  - Inputs are standard normal of shape (samples, *--input). If the module of the factory has a function
    example_inputs(n), they are what that returns: a tensor or a tuple of tensors, with n samples in dimension 0.
  - Outputs may be nested; every floating-point tensor among them must have the samples in dimension 0.
  - Dropout modules are put into eval mode: the ranks cannot drop what one process drops. A model that is random in
    another way is refused.
  - Every rank runs the whole batch once more by itself: keep the inputs small.""",
    )
    parser.add_argument("--model", metavar="MODULE:FACTORY", help="check this model instead of the layer")
    parser.add_argument("--input", metavar="C,H,W", type=_shape, help="shape of one sample for --model: 3,64,64")
    parser.add_argument("--json", action="store_true", help="print one JSON object (rank 0) instead of the table")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for all of it (300)")
    parser.set_defaults(run=run)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected the sizes of one sample, as 3,64,64, got {text!r}")
    return tuple(int(size) for size in text.split(","))


def run(arguments: argparse.Namespace) -> None:
    """Compare; rank 0 prints. Exit with 1 if an error is beyond its bound."""
    if arguments.input and not arguments.model:
        sys.exit("error: --input is of a model: give --model too")
    try:
        launch = detect(os.environ)
    except LaunchError as error:
        end(Launch("unknown"), str(error))
    with Deadline(arguments.timeout, launch) as deadline:
        comm = join(launch, deadline)
        deadline.doing = "comparing"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            if arguments.model:
                rows = verify_model(arguments.model, arguments.input, comm, device)
            else:
                rows = verify_layer(comm, device)
        except Exception as error:  # said, and the process ends: alone it would leave MPI's other ranks waiting
            if not isinstance(error, SyncBatchNormError):
                traceback.print_exc()  # of the user's model, most likely
            end(launch, str(error))
        if comm.rank == 0:
            _print(rows, arguments, launch, comm, device)
        deadline.doing = "waiting for rank 0 to print"
        comm.all_reduce(torch.zeros(1, device="cpu"))  # the first rank that exits with 1 ends the job
    if not all(row.passed for row in rows):
        sys.exit(1)


def verify_layer(comm: Communicator, device: str) -> list[Row]:
    """Compare the layer in every case, and the control in one. Every rank returns the same."""
    shares = SHARES if comm.size > 1 else ["equal"]
    rows: list[Row] = []
    plain = itertools.starmap(Case, itertools.product(DTYPES, LAYOUTS, shares))
    for case in itertools.chain(plain, (Case(dtype, "contiguous", "equal", silu=True) for dtype in DTYPES)):
        sync = SyncBatchNorm(CHANNELS, EPS, MOMENTUM, process_group=comm, device=device)
        sync.activation = "silu" if case.silu else None
        rows += _compare(case, sync, comm, device)
    if comm.size > 1:
        local = nn.BatchNorm2d(CHANNELS, EPS, MOMENTUM, device=device)
        control = next(_compare(Case("float64", "contiguous", "equal"), local, comm, device))
        rows.append(Row("control: nn.BatchNorm2d", "y", control.error, control.bound, control=True))
    return over_ranks(rows, comm)


def _compare(case: Case, layer: nn.Module, comm: Communicator, device: str) -> Iterator[Row]:
    xs, gs, weight, bias = _data(case, comm.size)
    expected = _whole_batch(xs, gs, weight, bias, comm.rank, silu=case.silu)
    x, g = (_placed(part[comm.rank], case, device) for part in (xs, gs))
    ours = _step(layer.to(DTYPES[case.parameter_dtype()][0]), x, g, weight, bias, comm)
    for name, value in expected.items():
        yield Row(str(case), name, error_of(ours[name], value), case.bound(name))


def _data(case: Case, size: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Draw all ranks' x and dy, alike on every rank and rounded to the dtype; ranks differ in mean and scale."""
    generator = torch.Generator().manual_seed(0)
    space = () if case.layout == "(N, C)" else PIXELS
    dtype = DTYPES[case.dtype][0]
    xs, gs = [], []
    for rank, samples in enumerate(SHARES[case.shares](size)):
        x, g = torch.randn(2, samples, CHANNELS, *space, generator=generator, dtype=torch.float64, device="cpu")
        xs.append((x * (1 + rank % 3) + rank % 5).to(dtype).double())
        gs.append(g.to(dtype).double())
    weight, bias = torch.rand(2, CHANNELS, generator=generator, device="cpu").double() + 0.5
    return xs, gs, weight, bias


def _placed(x: Tensor, case: Case, device: str) -> Tensor:
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return x.to(device, DTYPES[case.dtype][0], memory_format=layout)


def _whole_batch(
    xs: Sequence[Tensor], gs: Sequence[Tensor], weight: Tensor, bias: Tensor, rank: int, *, silu: bool
) -> dict[str, Tensor]:
    """Return what must come out on `rank`."""
    x = torch.cat(list(xs)).requires_grad_()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    mean, var = x.new_zeros(CHANNELS), x.new_ones(CHANNELS)
    y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=MOMENTUM, eps=EPS)
    y = F.silu(y) if silu else y
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.cat(list(gs)))
    start = sum(len(part) for part in xs[:rank])
    mine = slice(start, start + len(xs[rank]))
    return {
        "y": y[mine].detach(), "dx": dx[mine], "dweight": dweight, "dbias": dbias,
        "running_mean": mean, "running_var": var,
    }  # fmt: skip


def _step(layer: Any, x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, comm: Communicator) -> dict[str, Tensor]:
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    dparameters = torch.cat([layer.weight.grad, layer.bias.grad]).double().cpu()
    dweight, dbias = comm.all_reduce(dparameters).view(2, CHANNELS)
    return {
        "y": y.detach(), "dx": x.grad, "dweight": dweight, "dbias": dbias,
        "running_mean": layer.running_mean, "running_var": layer.running_var,
    }  # fmt: skip


def _print(rows: Sequence[Row], arguments: argparse.Namespace, launch: Launch, comm: Communicator, device: str) -> None:
    kernels = kernels_for(torch.empty(1, 1, device=device)).__name__.rpartition("._")[2]
    path = f"{'compiled' if kernels == 'cpu' else kernels} kernels"
    world = {"launcher": launch.launcher, "ranks": comm.size, "world": type(comm).__name__, "device": device}
    if arguments.json:
        print(
            json.dumps(
                {
                    "passed": all(row.passed for row in rows),
                    **world,
                    "path": path,
                    "rows": [asdict(row) for row in rows],
                }
            ),
            flush=True,
        )
        return
    of = f"{arguments.model} in float64" if arguments.model else "SyncBatchNorm"
    print(f"{of} on {plural(comm.size, 'rank')} ({type(comm).__name__}, {device}, {path}) against the whole batch\n")
    print(_model_table(rows) if arguments.model else _layer_table(rows))
    wrong = [row.verdict() for row in rows if not row.passed]
    more = [f"... and {len(wrong) - SHOWN} more (--json has all)"] if len(wrong) > SHOWN else []
    print("\n".join(["", *wrong[:SHOWN], *more, "FAILED" if wrong else "passed"]), flush=True)


def _layer_table(rows: Sequence[Row]) -> str:
    """One line a case; of several quantities the one that is nearest to its bound."""
    lines = []
    for case, group in itertools.groupby(rows, lambda row: row.case):
        members = list(group)
        cells = []
        for names in QUANTITIES.values():
            worst = max((row for row in members if row.quantity in names), key=Row.part_of_bound, default=None)
            cells += ["", ""] if worst is None else [f"{worst.error:.1e}", worst.required()]
        lines.append([case, *cells, "ok" if all(row.passed for row in members) else "FAILED"])
    header = itertools.chain.from_iterable((name, "bound") for name in QUANTITIES)
    return table(["dtype, layout, shares", *header, ""], lines)


def _model_table(rows: Sequence[Row]) -> str:
    lines = [
        [row.case, row.quantity, f"{row.error:.1e}", row.required(), "ok" if row.passed else "FAILED"] for row in rows
    ]
    return table(["compared", "worst", "error", "bound", ""], lines)
