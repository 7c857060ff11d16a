"""Count what one replica of two asks of a GPU in training, and time its host. No GPU takes part.

    python benchmarks/launches.py [--repeat 300]

For syncbn with its Triton kernels, syncbn with PyTorch's CUDA operations, and torch.nn.SyncBatchNorm's own autograd
function: launches per direction, and microseconds of host time for a forward and backward. Affine, running statistics,
float32, (8, 64, 14, 14). Alone, and with relu: in syncbn its activation, else torch's relu behind the norm.

A launch is a dispatched operation that is no view, no allocation and no collective (copies and fills count), one of
PyTorch's batch_norm_* CUDA operations, or a launch of a Triton kernel. The tensors lie on the CPU and hold nothing of
use: the batch_norm_* operations only make room for their results, Triton works for a driver that compiles for sm_80
and launches nothing, and the collective gives back what it gets. So the host time is that of Python, of the dispatch
of small operations (which a CPU then also carries out), and of Triton's launcher up to the driver's call; what the
calls of CUDA and NCCL cost is missing from all three.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it has no launcher then

import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from syncbn import _autograd
from syncbn._epilogue import Activation, Epilogue
from syncbn._statistics import Running
from syncbn.kernels import _select, _torch, _triton

Step = Callable[[Tensor, nn.BatchNorm2d], Tensor]
SHAPE, EPS, MOMENTUM = (8, 64, 14, 14), 1e-5, 0.1
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}

launches: list[str] = []
given: list[dict[str, Any]] = []  # the arguments of each launch of a Triton kernel


class Counting(TorchDispatchMode):
    """Writes down what is dispatched, where it is a launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if namespace != "c10d" and name not in ALLOCATIONS and not is_view:
            launches.append(name)
        return func(*args, **(kwargs or {}))


class Driver(DriverBase):
    """Triton's idea of a GPU, which launches nothing: it writes the names down."""

    class utils:  # noqa: N801
        """What the driver of a GPU has in C."""

        load_binary = staticmethod(lambda name, *_: (name, name, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 16})

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            launches.append(source.fn.__name__)
            given.append(dict(zip(source.fn.arg_names, arguments[-len(source.fn.arg_names) :], strict=True)))

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None


class Peerless:
    """One replica of two, whose all-reduce gives back what it gets."""

    rank, size = 0, 2

    def all_reduce(self, x: Tensor, place: object = None) -> Tensor:
        return x


def room(x: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(shape) for shape in shapes)


CUDA_OPERATIONS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, eps: room(x, (x.shape[1],), (x.shape[1],)),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda dy, x, *_: room(x, *4 * ((x.shape[1],),)),
    "batch_norm_backward_elemt": lambda dy, x, *_: torch.empty_like(x),
    "batch_norm_gather_stats_with_counts": lambda x, *_: room(x, (x.shape[1],), (x.shape[1],)),
}


@contextmanager
def cuda_operations() -> Iterator[None]:
    """Put operations that only make room in place of PyTorch's."""

    def launched(name: str, make_room: Callable[..., Any], *arguments: Any) -> Any:
        launches.append(name)
        with _disable_current_modes():
            return make_room(*arguments)

    stubs = {name: functools.partial(launched, name, make_room) for name, make_room in CUDA_OPERATIONS.items()}

    def gather(output: Tensor, mine: Tensor, *_: Any, **__: Any) -> None:
        with _disable_current_modes():
            output.view(2, -1).copy_(mine.view(1, -1))

    with mock.patch.multiple(torch, **stubs), mock.patch.object(dist, "all_gather_single", gather):
        yield


@contextmanager
def kernels(chosen: Any) -> Iterator[None]:
    """Let these kernels take the tensors."""
    with (
        mock.patch.object(_select, "_sets", (chosen,)),
        mock.patch.object(chosen, "takes", return_value=True),
        mock.patch.object(_triton, "refuse_total"),  # reads a number of the CPU, but none of a GPU
    ):
        yield


def ours(activation: Activation | None, x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    running = Running(layer.running_mean, layer.running_var, layer.num_batches_tracked, MOMENTUM)
    epilogue = Epilogue(layer.weight, layer.bias, None, activation)
    return _autograd.sync_batch_norm(x, epilogue, running, EPS, Peerless())


def torchs(activation: Activation | None, x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    layer.num_batches_tracked.add_(1)  # as torch.nn.SyncBatchNorm.forward does
    y = TorchFunction.apply(
        x, layer.weight, layer.bias, layer.running_mean, layer.running_var, EPS, MOMENTUM, dist.group.WORLD, 2
    )
    return y if activation is None else activation(y)


def count(step: Step) -> tuple[list[str], list[str]]:
    """Return the launches of a forward and of the backward of what it returns."""
    x, layer, dy = torch.randn(SHAPE, requires_grad=True), nn.BatchNorm2d(SHAPE[1]), torch.randn(SHAPE)
    inputs = (x, layer.weight, layer.bias)
    found = []
    step(x, layer)  # what is set up once
    with Counting():
        launches.clear()
        y = step(x, layer)
        found.append(launches.copy())
        launches.clear()
        torch.autograd.grad(y, inputs, dy)
        found.append(launches.copy())
    return found[0], found[1]


def host_time(step: Step, repeat: int) -> float:
    """Return microseconds of a forward and backward, the median."""
    x, layer, dy = torch.randn(SHAPE, requires_grad=True), nn.BatchNorm2d(SHAPE[1]), torch.randn(SHAPE)
    inputs = (x, layer.weight, layer.bias)
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        torch.autograd.grad(step(x, layer), inputs, dy)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[repeat // 10 :]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=300)
    parser.add_argument("--names", action="store_true", help="list the launches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    triton.runtime.driver.set_active(Driver())
    print(f"{'':38} forward  backward  host, us")
    rows = (
        ("syncbn, Triton", _triton, ours),
        ("syncbn, PyTorch's operations", _torch, ours),
        ("torch.nn.SyncBatchNorm", _torch, torchs),
    )
    for activation, (name, chosen, norm) in itertools.product((None, Activation("relu")), rows):
        step = functools.partial(norm, activation)
        with cuda_operations(), kernels(chosen):
            forward, backward = count(step)
            microseconds = host_time(step, arguments.repeat)
        title = f"{name} with {activation}" if activation else name
        print(f"{title:38} {len(forward):7}  {len(backward):8}  {microseconds:8.0f}")
        if arguments.names:
            for direction in (forward, backward):
                print("   ", ", ".join(f"{n} {times}" for n, times in Counter(direction).items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
