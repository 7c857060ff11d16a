"""What the watchdog costs: blocks of steps with it and without, interleaved, as paired ratios.

    torchrun --nproc-per-node 2 benchmarks/watchdog.py [--blocks 21]

A block takes about two seconds, so that the watchdog's thread looks and writes in it; the blocks that have one also
start and end it. What it keeps in `all_reduce` (two references to the vector) is there in both, and timed by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import timeit
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from resnet18 import training_step

import syncbn
from syncbn.cli._measure import interleaved, median, paired_ratio
from syncbn.comm import Communicator
from syncbn.comm._board import of_torch
from syncbn.comm._watchdog import Watchdog

SECONDS = 2.0  # of a block


def layer_step() -> Callable[[], None]:
    """Forward and backward of the small layer."""
    layer = syncbn.SyncBatchNorm(64)
    x = torch.randn(8, 64, 14, 14, requires_grad=True)
    dy = torch.randn_like(x)
    return lambda: layer(x).backward(dy)


def cost(step: Callable[[], None], comm: Communicator, blocks: int) -> dict[str, float]:
    """Return the ratio of blocks with and without the watchdog, and that of blocks without to others without."""
    step()
    start = time.perf_counter()
    for _ in range(3):
        step()
    seconds = comm.all_reduce(torch.tensor([time.perf_counter() - start], dtype=torch.float64)).item() / comm.size / 3
    steps = max(1, round(SECONDS / seconds))
    board = of_torch(comm.rank, comm.size, 0)
    assert board is not None

    def without() -> None:
        for _ in range(steps):
            step()

    def with_it() -> None:
        dog = Watchdog(comm, board, 60.0)
        dog.start()
        without()
        dog.end("has ended")

    times = interleaved({"on": with_it, "off": without, "off again": without}, comm, blocks)
    return {
        "steps in a block": steps,
        "seconds of a block": median(times["off"]),
        "on to off": paired_ratio(times["on"], times["off"]),
        "off to off": paired_ratio(times["off again"], times["off"]),
    }


def processor_time(comm: Communicator) -> dict[str, float]:
    """Return what a look of the thread takes, once a second, and what `all_reduce` does for it, whoever else runs."""
    board = of_torch(comm.rank, comm.size, 1)
    assert board is not None
    dog, x = Watchdog(comm, board, 60.0), torch.zeros(1)

    def look() -> None:
        dog._sums.look()
        dog._write()

    def keep() -> None:
        comm.vector = x
        comm.vector = None

    times = {name: timeit.timeit(fn, number=2000, timer=time.process_time) / 2000 for name, fn in
             {"look, us": look, "keep, us": keep}.items()}  # fmt: skip
    return {name: 1e6 * seconds for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=21)
    blocks = parser.parse_args().blocks
    comm = syncbn.init(timeout=timedelta(minutes=5), watchdog=timedelta(0))
    found = {"layer (8, 64, 14, 14)": cost(layer_step(), comm, blocks)}
    found["ResNet-18, 1 image"] = cost(training_step(syncbn.SyncBatchNorm, images=1), comm, blocks)
    found["processor time"] = processor_time(comm)
    if comm.rank == 0:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
