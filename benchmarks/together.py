"""What layers gain that share their collectives: forward and backward, one by one and together, paired in one run.

    launch/torchrun.sh --procs-per-node 2 -- benchmarks/together.py
    SYNCBN_SHARED_MEMORY=0 launch/torchrun.sh --procs-per-node 4 -- benchmarks/together.py

"Levels": five layers of 256 channels on the maps of a feature pyramid. "Branches": the five norms of an ASPP of 256
channels. "ResNet-18": a model with three shortcuts that have a norm, on images of 64 x 64; its blocks know nothing of
this, there is one `with syncbn.together()` around it. Medians of rank 0, and the median of the ratios of runs that
followed each other; and how many all-reduces there are in a step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Callable, Sequence

import torch
from resnet18 import resnet18
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import syncbn
from syncbn.cli._measure import interleaved, paired_ratio
from syncbn.comm import Communicator

CHANNELS = 256
MAPS = {"levels": [32, 16, 8, 4, 2], "branches": [16, 16, 16, 16, 1]}


class Counting:
    """A communicator that counts."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.rank, self.size, self.calls = comm, comm.rank, comm.size, 0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self._comm.all_reduce(x)


def single(layers: Sequence[nn.Module], xs: Sequence[Tensor]) -> list[Tensor]:
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


def block(layers: Sequence[nn.Module], xs: Sequence[Tensor]) -> list[Tensor]:
    with syncbn.together():
        return single(layers, xs)


def of_layers(sizes: Sequence[int], group: Counting) -> dict[str, Callable[[], None]]:
    """Forward and backward of a layer on each of the maps, one way and the other."""
    layers = [syncbn.SyncBatchNorm(CHANNELS, process_group=group) for _ in sizes]
    xs = [torch.randn(2, CHANNELS, size, size, requires_grad=True) for size in sizes]
    dys = [torch.randn_like(x) for x in xs]

    def step(how: Callable[..., list[Tensor]]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(how(layers, xs), dys)

    return {"single": step(single), "function": step(syncbn.normalize_together), "block": step(block)}


def of_resnet(group: Counting) -> dict[str, Callable[[], None]]:
    """Forward and backward of the model."""
    model = resnet18(lambda channels: syncbn.SyncBatchNorm(channels, process_group=group))
    x = torch.randn(2, 3, 64, 64)

    def step(context: Callable[[], contextlib.AbstractContextManager[None]]) -> Callable[[], None]:
        def run() -> None:
            with context():
                y = model(x)
            y.square().sum().backward()

        return run

    return {"single": step(contextlib.nullcontext), "block": step(syncbn.together)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="of each variant; a tenth of the ResNet (200)")
    repeats = parser.parse_args().repeats
    comm = syncbn.init("gloo")
    group = Counting(comm)
    table = Table(title=f"{comm!r}, {os.cpu_count()} cores: ms, medians", title_justify="left")
    for column in ("what", "how", "all-reduces", "ms", "/ single"):
        table.add_column(column, justify="left" if len(table.columns) < 2 else "right")
    cases = {name: (of_layers(sizes, group), repeats) for name, sizes in MAPS.items()}
    cases["ResNet-18"] = of_resnet(group), max(1, repeats // 10)
    for name, (variants, times) in cases.items():
        seconds = interleaved(variants, comm, times)
        for how, step in variants.items():
            before = group.calls
            step()
            ratio = paired_ratio(seconds[how], seconds["single"])
            table.add_row(
                name, how, str(group.calls - before), f"{1e3 * statistics.median(seconds[how]):.2f}", f"{ratio:.2f}"
            )
    if comm.rank == 0:
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
