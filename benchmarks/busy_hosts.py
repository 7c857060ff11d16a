"""What waiting costs, on cores that are idle and on cores that others use, too: collectives, a small layer, a step.

    launch/torchrun.sh --procs-per-node 2 -- benchmarks/busy_hosts.py
    launch/torchrun.sh --procs-per-node 4 -- benchmarks/busy_hosts.py     # on 2 cores: ranks that wait for a core

Measures twice: as the machine is, and beside one process for each core that decodes and scales images as the workers of
a data loader do, at the same priority. Columns: one all-reduce of 129 float64 numbers (a layer of 64 channels) over
syncbn's communicator and over Gloo; forward and backward of the layer at (2, 64, 8, 8), which has two of them; and the
median over the runs of that layer / one Gloo all-reduce that followed each other: 0.3 at most on idle cores and 1.0 on
busy ones is the aim. Then a training step, synchronised / local, of the ResNet of `syncbn bench` and of
ResNet-18. All variants run interleaved; the times are of rank 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from resnet18 import training_step
from rich.console import Console
from rich.table import Table
from torch import nn

import syncbn
from syncbn.cli._bench import SMALL, forward_backward
from syncbn.cli._measure import interleaved, paired_ratio
from syncbn.cli._training import resnet
from syncbn.comm import Communicator

LAYER, GLOO = f"layer {SMALL}", "Gloo all-reduce"


def load() -> None:
    """Decode, scale and normalise one image again and again; says so when it begins."""
    from PIL import Image

    torch.set_num_threads(1)
    file = io.BytesIO()
    Image.effect_noise((640, 480), 80).convert("RGB").save(file, "JPEG")
    print("busy", flush=True)
    while True:
        image = Image.open(io.BytesIO(file.getvalue())).resize((224, 224), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3)
        pixels.permute(2, 0, 1).float().div_(255).sub_(0.5).contiguous()


@contextlib.contextmanager
def busy_cores(comm: Communicator) -> Iterator[None]:
    """Rank 0 runs a `load` for each core meanwhile."""
    cores = len(os.sched_getaffinity(0)) if comm.rank == 0 else 0
    command = [sys.executable, __file__, "--load"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(cores)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        comm.all_reduce(torch.zeros(1))
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def waits(comm: Communicator, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant."""
    layer, x, dy = syncbn.SyncBatchNorm(SMALL[1]), torch.randn(SMALL, requires_grad=True), torch.randn(SMALL)
    numbers = torch.zeros(2 * SMALL[1] + 1, dtype=torch.float64)
    variants = {
        "all-reduce": lambda: comm.all_reduce(numbers),
        GLOO: lambda: dist.all_reduce(numbers),
        LAYER: lambda: forward_backward(layer, x, dy),
    }
    return interleaved(variants, comm, repeats)


def steps(comm: Communicator, repeats: int) -> tuple[float, float]:
    """Synchronised / local of the small ResNet and of ResNet-18."""
    variants = {"sync": training_step(syncbn.SyncBatchNorm), "local": training_step(nn.BatchNorm2d)}
    times = interleaved(variants, comm, repeats)
    return resnet(comm, repeats)["sync_to_local"], paired_ratio(times["sync"], times["local"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="of the collectives and the layer (1000)")
    parser.add_argument("--steps", type=int, default=10, help="of each training; 0: none (10)")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load()
    comm = syncbn.init("gloo")
    size = f"{comm.size} ranks x {torch.get_num_threads()} thread on {os.cpu_count()} cores"
    table = Table(title=f"{size}: µs, median and 95th percentile; medians of ratios", title_justify="left")
    columns = "cores", "all-reduce", GLOO, LAYER, "layer / Gloo", "small ResNet: sync / local", "ResNet-18: the same"
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for cores in ("as they are", "busy"):
        with busy_cores(comm) if cores == "busy" else contextlib.nullcontext():
            times = waits(comm, arguments.repeats)
            ratios = steps(comm, arguments.steps) if arguments.steps else ()
        both = [(1e6 * statistics.median(t), 1e6 * statistics.quantiles(t, n=20)[-1]) for t in times.values()]
        ratios = (paired_ratio(times[LAYER], times[GLOO]), *ratios)
        table.add_row(cores, *(f"{half:.1f}, {most:.1f}" for half, most in both), *(f"{r:.2f}" for r in ratios))
    if comm.rank == 0:
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
