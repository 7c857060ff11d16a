"""`syncbn bench`: the layer against nn.BatchNorm2d and against what the memory allows."""

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


def add_command(commands: Any) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="time the layer, its collectives and a training step",
        description="Times the layer against nn.BatchNorm2d, the composed path, the streaming floor and the bare "
        "collectives. Start it alone or in two ranks: syncbn launch torchrun --procs-per-node 2 -- -m syncbn bench",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.add_argument("--repeats", type=int, default=30, help="interleaved runs of each variant")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.png")


def run(arguments: argparse.Namespace) -> Record:
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
        "fused": [fused(case, comm, arguments.repeats, added=added) for case in CASES[:2] for added in (False, True)],
        "compiled": [compiled(Case(shape), comm, arguments.repeats) for shape in (LARGE, SMALL)],
        "resnet": resnet(comm, arguments.repeats),
        "saved": saved_for_backward(),
        "errors": [errors(dtype, layout) for dtype in ("float32", "bfloat16", "float16") for layout in FORMATS],
    }
    if comm.rank == 0:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "bench.json").write_text(json.dumps(results, indent=1))
        _report.show(results)
        _report.draw(results, arguments.output / "bench.png")
        print(f"written: {arguments.output / 'bench.json'}, {arguments.output / 'bench.png'}")
    return results


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
        variants["floor"] = _streaming_floor(x.detach(), dy, None)
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


def fused(case: Case, comm: Communicator, repeats: int, *, added: bool) -> Record:
    """Time norm + ReLU, or norm + addition + ReLU, in the norm's own passes and one by one, forward and backward."""
    x, dy, channels = case.random().requires_grad_(), case.random(), case.shape[1]
    residual = case.random().requires_grad_() if added else None
    plain = nn.BatchNorm2d(channels, device=device())
    sync = syncbn.SyncBatchNorm(channels, device=device(), activation="relu")
    alone = syncbn.SyncBatchNorm(channels, process_group=SingleProcess(), device=device(), activation="relu")

    def one_by_one(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = plain(x)
        return torch.relu_(y if residual is None else y.add_(residual))

    variants = {
        "syncbn": lambda: forward_backward(sync, x, dy, residual),
        "one rank": lambda: forward_backward(alone, x, dy, residual),
        "nn.BatchNorm2d + nn.ReLU": lambda: forward_backward(one_by_one, x, dy, residual),
        "floor": _streaming_floor(x.detach(), dy, None if residual is None else residual.detach()),
        "collectives": lambda: _bare_collectives(comm, channels),
    }
    times = interleaved(variants, comm, repeats)
    return {
        "case": f"{case}{' with addition' if added else ''}",
        "seconds": {name: median(t) for name, t in times.items()},
        "to_unfused": paired_ratio(times["syncbn"], times["nn.BatchNorm2d + nn.ReLU"]),
        "one_rank_to_unfused": paired_ratio(times["one rank"], times["nn.BatchNorm2d + nn.ReLU"]),
        "to_floor": _to_floor(times),
    }


def forward_backward(module: Callable[..., Tensor], x: Tensor, dy: Tensor, residual: Tensor | None = None) -> None:
    """One forward and one backward down to the input, and to the residual."""
    x.grad = None
    if residual is None:
        module(x).backward(dy)  # type: ignore[no-untyped-call]
    else:
        residual.grad = None
        module(x, residual).backward(dy)  # type: ignore[no-untyped-call]


def _composed(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    with composed_only():
        forward_backward(module, x, dy)


def _bare_collectives(comm: Communicator, channels: int) -> None:
    for numel in (2 * channels + 1, 2 * channels):
        comm.all_reduce(torch.zeros(numel, dtype=torch.float64, device=device()))


def _streaming_floor(x: Tensor, dy: Tensor, residual: Tensor | None) -> Callable[[], None]:
    """The memory traffic that forward and backward cannot avoid: read, copy, two-read dot, two-read-one-write add.

    With a residual it is read as well, and its gradient written.
    """
    a, b = (t.as_strided((t.numel(),), (1,)) for t in (x, dy))

    def floor() -> None:
        torch.dot(a, a)  # the sums: read x
        torch.empty_like(a).copy_(a)  # the normalisation: read x, write y
        torch.dot(a, b)  # the backward sums: read x and dy
        torch.add(a, b)  # the input gradient: read x and dy, write dx

    if residual is None:
        return floor
    c = residual.as_strided((residual.numel(),), (1,))

    def floor_with_residual() -> None:
        torch.dot(a, a)
        torch.add(a, c)  # read x and the residual, write y
        torch.addcmul(a, b, c)  # read x, dy and the residual, write its gradient
        torch.add(a, b)

    return floor_with_residual


def _to_floor(times: dict[str, list[float]]) -> float:
    least = [a + b for a, b in zip(times["floor"], times["collectives"], strict=True)]
    return paired_ratio(times["syncbn"], least)


def compiled(case: Case, comm: Communicator, repeats: int) -> Record:
    """Time norm + ReLU, forward and backward, under torch.compile and in eager; not where inductor has no compiler."""
    if device() == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return {"case": str(case), "seconds": {}, "to_eager": None, "fused_to_eager": None}
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
    one = torch.compile(syncbn.SyncBatchNorm(case.shape[1], device=device(), activation="relu"), fullgraph=True)
    forward_backward(one, x, dy)
    variants = {
        "fused, compiled": lambda: forward_backward(one, x, dy),
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
        "fused_to_eager": paired_ratio(times["fused, compiled"], times["eager"]),
        "to_eager_of_batch_norm": paired_ratio(times["nn.BatchNorm2d compiled"], times["nn.BatchNorm2d eager"]),
        "to_batch_norm": paired_ratio(times["compiled"], times["nn.BatchNorm2d compiled"]),
    }


def saved_for_backward() -> Record:
    """Count the numbers that each layer keeps for backward beside its input and parameters, at (2, 64, 8, 8)."""
    norm, activated = syncbn.SyncBatchNorm(64, device="cpu"), syncbn.SyncBatchNorm(64, device="cpu", activation="relu")
    layers = {
        "nn.BatchNorm2d": nn.BatchNorm2d(64, device="cpu"),
        "syncbn": norm,
        "nn.BatchNorm2d + nn.ReLU": nn.Sequential(nn.BatchNorm2d(64, device="cpu"), nn.ReLU()),
        "syncbn with activation": activated,
    }
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
