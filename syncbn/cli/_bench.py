"""`python -m syncbn bench`: the layer against nn.BatchNorm2d and against what the memory allows."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.comm import Communicator, SingleProcess
from syncbn.errors import BackendError
from syncbn.kernels import composed_only

from ._measure import Variants, device, interleaved, median, paired_ratio
from ._training import resnet

Record = dict[str, Any]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LARGE, DEEP, WIDE, SMALL = (2, 256, 100, 152), (2, 2048, 7, 7), (8, 32, 32, 32), (2, 64, 8, 8)


@dataclass(frozen=True)
class Case:
    """One input to the layer."""

    shape: tuple[int, int, int, int]
    memory_format: str = "contiguous"
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.memory_format} {self.dtype}"

    def random(self) -> Tensor:
        """Return a tensor of this shape, dtype and memory format."""
        x = torch.randn(self.shape, device=device()).to(DTYPES[self.dtype])
        return x.to(memory_format=FORMATS[self.memory_format])


CASES = (
    Case(LARGE),
    Case(LARGE, "channels_last"),
    Case(LARGE, dtype="bfloat16"),
    Case(LARGE, dtype="float16"),
    Case((2, 64, 200, 304)),
    Case((2, 512, 50, 76)),
    Case(DEEP),
    Case(WIDE),
    Case(WIDE, "channels_last"),
    Case(SMALL),
)

# (what, at most): the project's own bars, for 2 ranks of one thread. "one rank": each by itself, without peers.
BARS = {
    "large contiguous / nn.BatchNorm2d": 0.75,
    "large channels_last / nn.BatchNorm2d": 0.85,
    "large contiguous / (floor + collectives)": 1.3,
    "(2, 2048, 7, 7) contiguous, one rank / nn.BatchNorm2d": 1.0,
    "(8, 32, 32, 32) contiguous, one rank / nn.BatchNorm2d": 1.0,
    "(8, 32, 32, 32) channels_last, one rank / nn.BatchNorm2d": 1.0,
    "small layer, one rank / nn.BatchNorm2d": 1.5,
    "small layer / one Gloo all-reduce": 0.3,
    "large bfloat16 / float32": 0.8,
    "large float16 / float32": 0.8,
    "ResNet step, sync / local": 1.02,
    "large norm + ReLU, compiled / eager": 1.2,
    "small norm + ReLU, compiled / eager": 2.0,
}


def add_command(commands: Any) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="time the layer, its collectives and a training step",
        description="Times the layer against nn.BatchNorm2d, the composed path, the streaming floor and the bare "
        "collectives. Start it alone or with launch/bench.sh.",
    )
    parser.add_argument("--repeats", type=int, default=30, help="interleaved runs of each variant")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure everything; rank 0 prints, writes and draws."""
    try:
        from . import _report
    except ImportError as error:
        raise BackendError(f"the benchmark's tables and picture need pip install 'syncbn[cli]' ({error})") from error
    comm = syncbn.init()
    results = {
        "machine": machine(comm),
        "latency": latency(comm, arguments.repeats),
        "layer": [layer(case, comm, arguments.repeats) for case in CASES],
        "compiled": [compiled(Case(shape), comm, arguments.repeats) for shape in (LARGE, SMALL)],
        "resnet": resnet(comm, arguments.repeats),
        "saved": saved_for_backward(),
        "errors": [errors(dtype, layout) for dtype in ("float32", "bfloat16", "float16") for layout in FORMATS],
    }
    results["bars"] = bars(results)
    if comm.rank == 0:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "bench.json").write_text(json.dumps(results, indent=1))
        _report.show(results)
        _report.draw(results, arguments.output / "bench.png")
        print(f"written: {arguments.output / 'bench.json'}, {arguments.output / 'bench.png'}")


def machine(comm: Communicator) -> Record:
    """Return what the figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "communicator": type(comm).__name__,
        "ranks": comm.size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": device,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def latency(comm: Communicator, repeats: int) -> list[Record]:
    """Time one all-reduce of float64 vectors, over `comm` and over the plain backend beneath it."""
    rows = []
    for numel in (1, 129, 1025, 8193):
        x = torch.zeros(numel, dtype=torch.float64, device=device())
        variants = {type(comm).__name__: _call(comm.all_reduce, x), **_plain_backend(x)}
        times = interleaved(variants, comm, 20 * repeats)
        rows += [{"numel": numel, "over": name, "seconds": median(t)} for name, t in times.items()]
    return rows


def _plain_backend(x: Tensor) -> Variants:
    if not dist.is_initialized():
        return {}
    return {dist.get_backend(): _call(dist.all_reduce, x)}


def _call(fn: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: fn(x)


def layer(case: Case, comm: Communicator, repeats: int) -> Record:
    """Time forward and backward of one layer in all variants."""
    x, dy = case.random().requires_grad_(), case.random()
    plain = nn.BatchNorm2d(case.shape[1], device=device())
    sync = syncbn.SyncBatchNorm(case.shape[1], device=device())
    alone = syncbn.SyncBatchNorm(case.shape[1], process_group=SingleProcess(), device=device())
    variants: dict[str, Callable[[], object]] = {
        "syncbn": lambda: forward_backward(sync, x, dy),
        "one rank": lambda: forward_backward(alone, x, dy),
        "nn.BatchNorm2d": lambda: forward_backward(plain, x, dy),
        "composed": lambda: _composed(sync, x, dy),
        "collectives": lambda: _bare_collectives(comm, case.shape[1]),
        **_plain_backend(torch.zeros(2 * case.shape[1] + 1, dtype=torch.float64, device=device())),
    }
    if torch.cuda.is_available() and comm.size > 1:
        native = nn.SyncBatchNorm(case.shape[1], device=device())
        variants["nn.SyncBatchNorm"] = lambda: forward_backward(native, x, dy)
    if case.dtype == "float32":
        variants["floor"] = _streaming_floor(x.detach(), dy)
    times = interleaved(variants, comm, repeats)
    with_floor = "floor" in times
    return {
        "case": str(case),
        "seconds": {name: median(t) for name, t in times.items()},
        "to_batch_norm": paired_ratio(times["syncbn"], times["nn.BatchNorm2d"]),
        "one_rank_to_batch_norm": paired_ratio(times["one rank"], times["nn.BatchNorm2d"]),
        "to_floor": _to_floor(times) if with_floor else None,
        "to_backend": paired_ratio(times["syncbn"], times[dist.get_backend()]) if dist.is_initialized() else None,
        "times": times["syncbn"],
    }


def forward_backward(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> None:
    """One forward and one backward down to the input."""
    x.grad = None
    module(x).backward(dy)  # type: ignore[no-untyped-call]


def _composed(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    with composed_only():
        forward_backward(module, x, dy)


def _bare_collectives(comm: Communicator, channels: int) -> None:
    for numel in (2 * channels + 1, 2 * channels):
        comm.all_reduce(torch.zeros(numel, dtype=torch.float64, device=device()))


def _streaming_floor(x: Tensor, dy: Tensor) -> Callable[[], None]:
    """The memory traffic that forward and backward cannot avoid: read, copy, two-read dot, two-read-one-write add."""
    a, b = (t.as_strided((t.numel(),), (1,)) for t in (x, dy))

    def floor() -> None:
        torch.dot(a, a)  # the sums: read x
        torch.empty_like(a).copy_(a)  # the normalisation: read x, write y
        torch.dot(a, b)  # the backward sums: read x and dy
        torch.add(a, b)  # the input gradient: read x and dy, write dx

    return floor


def _to_floor(times: dict[str, list[float]]) -> float:
    least = [a + b for a, b in zip(times["floor"], times["collectives"], strict=True)]
    return paired_ratio(times["syncbn"], least)


def compiled(case: Case, comm: Communicator, repeats: int) -> Record:
    """Time norm + ReLU, forward and backward, under torch.compile and in eager; not where inductor has no compiler."""
    if device() == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return {"case": str(case), "seconds": {}, "to_eager": None}
    torch.compiler.reset()  # another shape in the same code would be compiled for any shape
    x, dy = case.random().requires_grad_(), case.random()
    ours, theirs = (
        nn.Sequential(norm(case.shape[1], device=device()), nn.ReLU())
        for norm in (syncbn.SyncBatchNorm, nn.BatchNorm2d)
    )
    # Not ours.compile(), which leaves out what is defined in torch.nn: the ReLU.
    graph, their_graph = (torch.compile(copy.deepcopy(pair), fullgraph=True) for pair in (ours, theirs))
    forward_backward(graph, x, dy)  # compiles; what a second run may compile again is left to the run to warm up
    forward_backward(their_graph, x, dy)
    variants = {
        "compiled": lambda: forward_backward(graph, x, dy),
        "eager": lambda: forward_backward(ours, x, dy),
        "nn.BatchNorm2d compiled": lambda: forward_backward(their_graph, x, dy),
        "nn.BatchNorm2d eager": lambda: forward_backward(theirs, x, dy),
    }
    times = interleaved(variants, comm, repeats)
    return {
        "case": str(case),
        "seconds": {name: median(t) for name, t in times.items()},
        "to_eager": paired_ratio(times["compiled"], times["eager"]),
        "to_eager_of_batch_norm": paired_ratio(times["nn.BatchNorm2d compiled"], times["nn.BatchNorm2d eager"]),
        "to_batch_norm": paired_ratio(times["compiled"], times["nn.BatchNorm2d compiled"]),
    }


def saved_for_backward() -> Record:
    """Count the numbers that each layer keeps for backward beside its input and parameters, at (2, 64, 8, 8)."""
    layers = {"nn.BatchNorm2d": nn.BatchNorm2d(64, device="cpu"), "syncbn": syncbn.SyncBatchNorm(64, device="cpu")}
    return {**{name: _saved(layer) for name, layer in layers.items()}, "2C": 128}


def _saved(module: nn.Module) -> int:
    saved: list[Tensor] = []
    x = torch.randn(SMALL, requires_grad=True, device="cpu")

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    known = {x.data_ptr(), *(p.data_ptr() for p in module.parameters())}
    return sum(t.numel() for t in saved if t.data_ptr() not in known)


def errors(dtype: str, memory_format: str) -> Record:
    """Return the layer's root mean square error against float64, and that of nn.BatchNorm2d, on one replica."""
    case = Case((8, 64, 56, 56), memory_format, dtype)
    x, dy = case.random(), case.random()
    layers = {
        "syncbn": syncbn.SyncBatchNorm(64, process_group=SingleProcess(), device=device(), dtype=DTYPES[dtype]),
        "nn.BatchNorm2d": nn.BatchNorm2d(64, device=device(), dtype=DTYPES[dtype]),
    }
    reference = _outcome(nn.BatchNorm2d(64, device=device(), dtype=torch.float64), x.double(), dy.double())
    of: dict[str, dict[str, float]] = {}
    for name, module in layers.items():
        found = _outcome(module, x, dy)
        of[name] = {
            what: (found[what].double() - value).square().mean().sqrt().item() for what, value in reference.items()
        }
    return {"dtype": dtype, "memory_format": memory_format, **of}


def _outcome(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    grads = {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in module.named_buffers() if name.startswith("running")}
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **grads, **buffers}


def bars(results: Record) -> list[Record]:
    """Set the measured ratios beside the project's bars; those that need two ranks only where they are."""
    layers: dict[str, Record] = {row["case"]: row for row in results["layer"]}

    def row(shape: tuple[int, int, int, int], memory_format: str = "contiguous", dtype: str = "float32") -> Record:
        return layers[str(Case(shape, memory_format, dtype))]

    large, wide_last = row(LARGE), row(WIDE, "channels_last")
    in_large, in_small = (measured["to_eager"] for measured in results["compiled"])
    measured = {
        "large contiguous / nn.BatchNorm2d": large["to_batch_norm"],
        "large channels_last / nn.BatchNorm2d": row(LARGE, "channels_last")["to_batch_norm"],
        "large contiguous / (floor + collectives)": large["to_floor"],
        "(2, 2048, 7, 7) contiguous, one rank / nn.BatchNorm2d": row(DEEP)["one_rank_to_batch_norm"],
        "(8, 32, 32, 32) contiguous, one rank / nn.BatchNorm2d": row(WIDE)["one_rank_to_batch_norm"],
        "(8, 32, 32, 32) channels_last, one rank / nn.BatchNorm2d": wide_last["one_rank_to_batch_norm"],
        "small layer, one rank / nn.BatchNorm2d": row(SMALL)["one_rank_to_batch_norm"],
        "small layer / one Gloo all-reduce": row(SMALL)["to_backend"],
        "large bfloat16 / float32": paired_ratio(row(LARGE, dtype="bfloat16")["times"], large["times"]),
        "large float16 / float32": paired_ratio(row(LARGE, dtype="float16")["times"], large["times"]),
        "ResNet step, sync / local": results["resnet"]["sync_to_local"],
        "large norm + ReLU, compiled / eager": in_large,
        "small norm + ReLU, compiled / eager": in_small,
    }
    return [{"bar": name, "at_most": BARS[name], "measured": value} for name, value in measured.items()]
