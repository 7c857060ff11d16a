"""What one training step of ResNet-50's batch norm layers sends, for 2 to 4096 ranks: all-reduce against all-gather.

    python benchmarks/scale.py

The message sizes are counted, not assumed: a recording communicator under syncbn's layer, and recorded calls of
torch.distributed under torch.nn.SyncBatchNorm's own autograd function (its CUDA operations emulated on the CPU, see
tests/emulated_cuda.py). The times are a model: messages one after another cost `latency` each, bytes cost
1 / `bandwidth`; both are arguments, to be set to what was measured on the cluster in question.

Ring all-reduce of b bytes among P ranks: 2(P-1) messages, 2(P-1)/P·b bytes through each link. Recursive doubling:
log2 P messages of b bytes. Ring all-gather of b bytes a rank: P-1 messages, (P-1)·b bytes. (Thakur, Rabenseifner, Gropp
2005, "Optimization of Collective Communication Operations in MPICH", sections 4.1, 4.4.)
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction

from syncbn.comm import SingleProcess
from syncbn.functional import sync_batch_norm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import emulated_cuda

# Channels of ResNet-50's 53 norm layers (He et al. 2016, table 1): stem, then per stage its blocks and its shortcut.
STAGES = ((3, 64, 256), (4, 128, 512), (6, 256, 1024), (3, 512, 2048))
CHANNELS = [64] + [c for n, inner, outer in STAGES for c in [inner, inner, outer] * n + [outer]]
WORLDS = (2, 8, 64, 512, 4096)


class Recording(SingleProcess):
    """Counts the bytes of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def all_reduce(self, x: Tensor, place: object = None) -> Tensor:
        self.bytes.append(x.numel() * x.element_size())
        return x


def syncbn_messages(channels: int) -> list[int]:
    """Bytes that a rank hands to each all-reduce of one layer, forward and backward."""
    comm = Recording()
    x = torch.randn(2, channels, 2, 2, requires_grad=True)
    sync_batch_norm(x, process_group=comm).sum().backward()
    return comm.bytes


def torch_messages(channels: int) -> tuple[list[int], list[int]]:
    """Bytes that a rank hands to torch's (all-gathers, all-reduces) of one layer."""
    gathered: list[int] = []
    reduced: list[int] = []

    def all_gather_single(output: Tensor, x: Tensor, *_: object, **__: object) -> None:
        gathered.append(x.numel() * x.element_size())
        output.copy_(x.repeat(output.numel() // x.numel()).view(output.shape))

    def all_reduce(x: Tensor, *_: object, **__: object) -> None:
        reduced.append(x.numel() * x.element_size())

    group = mock.Mock(**{"_get_backend_name.return_value": "nccl"})
    patches = [mock.patch.object(torch, op.__name__, op) for op in emulated_cuda.OPERATIONS]
    patches += [mock.patch.object(dist, f.__name__, f) for f in (all_gather_single, all_reduce)]
    for patch in patches:
        patch.start()
    try:
        x = torch.randn(2, channels, 2, 2, requires_grad=True)
        weight, bias = torch.ones(channels), torch.zeros(channels)
        TorchFunction.apply(x, weight, bias, None, None, 1e-5, 0.1, group, 2).sum().backward()
    finally:
        mock.patch.stopall()
    return gathered, reduced


def ring_all_reduce(ranks: int, size: int) -> tuple[int, float]:
    """(messages one after another, bytes through each link)."""
    return 2 * (ranks - 1), 2 * (ranks - 1) / ranks * size


def doubling_all_reduce(ranks: int, size: int) -> tuple[int, float]:
    rounds = math.ceil(math.log2(ranks))
    return rounds, rounds * size


def ring_all_gather(ranks: int, size: int) -> tuple[int, float]:
    return ranks - 1, (ranks - 1) * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of one message (10e-6)")
    parser.add_argument("--bandwidth", type=float, default=10e9, help="bytes per second of a link (10e9)")
    arguments = parser.parse_args()

    ours = [size for c in CHANNELS for size in syncbn_messages(c)]
    torchs = [torch_messages(c) for c in CHANNELS]
    gathered, reduced = ([size for pair in torchs for size in pair[i]] for i in (0, 1))

    def seconds(messages: float, size: float) -> float:
        return messages * arguments.latency + size / arguments.bandwidth

    def cost(algorithm, sizes, ranks):  # type: ignore[no-untyped-def]
        parts = [algorithm(ranks, size) for size in sizes]
        return sum(m for m, _ in parts), sum(b for _, b in parts)

    console = Console(width=120)
    console.print(
        f"ResNet-50: {len(CHANNELS)} layers. A rank hands over, per step: syncbn {sum(ours)} bytes in {len(ours)} "
        f"all-reduces;\ntorch.nn.SyncBatchNorm {sum(gathered)} bytes in {len(gathered)} all-gathers and {sum(reduced)} "
        f"in {len(reduced)} all-reduces."
    )
    table = Table(title=f"Model: {arguments.latency * 1e6:g} µs a message, {arguments.bandwidth / 1e9:g} GB/s a link")
    for column in ("ranks", "syncbn MB", "torch MB", "syncbn ring ms", "syncbn doubling ms", "torch ring ms"):
        table.add_column(column, justify="right")
    for ranks in WORLDS:
        ring, doubling = cost(ring_all_reduce, ours, ranks), cost(doubling_all_reduce, ours, ranks)
        gather, reduce = cost(ring_all_gather, gathered, ranks), cost(ring_all_reduce, reduced, ranks)
        table.add_row(
            str(ranks), f"{ring[1] / 1e6:.2f}", f"{(gather[1] + reduce[1]) / 1e6:.2f}",
            *(f"{1e3 * seconds(*c):.2f}" for c in (ring, doubling)),
            f"{1e3 * (seconds(*gather) + seconds(*reduce)):.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
