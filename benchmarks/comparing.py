"""What it costs that the ranks compare what a sum is for.

    launch/torchrun.sh --procs-per-node 2 -- benchmarks/comparing.py [--repeats 200]
    SYNCBN_SHARED_MEMORY=0 launch/torchrun.sh --procs-per-node 2 -- benchmarks/comparing.py
    launch/mpirun.sh --procs-per-node 2 -- benchmarks/comparing.py
    launch/horovodrun.sh --procs-per-node 2 -- benchmarks/comparing.py

A forward and backward of the small layer (2, 64, 8, 8), many to a run, and a training step of a small residual network,
as they are, against a communicator that sends the bare vector and counts nothing ("bare"); with a sum of three numbers
before each ("checked", where the backend cannot see lengths by itself). Interleaved in one run, medians of paired
ratios to "bare", of rank 0. benchmarks/watchdog.py has the watchdog's share, which runs here on both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from syncbn.cli._measure import interleaved, median, paired_ratio
from syncbn.cli._training import small_resnet
from syncbn.comm import _verdict
from syncbn.comm._carried import Carrying
from syncbn.comm._protocol import BaseCommunicator, check_payload

SHAPE, CALLS = (2, 64, 8, 8), 50


def bare_all_reduce(self: BaseCommunicator, x: Tensor, place: object = None) -> Tensor:
    """`BaseCommunicator.all_reduce` without what this file measures."""
    check_payload(x)
    self._check(x)
    if self.state != "open":
        raise self._not_open(place)
    try:
        return self._sum(x, 0)[0]
    except RuntimeError as error:
        self.fail(str(error))
        raise


def bare_carried(self: Any, x: Tensor, signature: int) -> tuple[Tensor, int]:
    return self._add(x), _verdict.AGREE


@contextmanager
def bare() -> Iterator[None]:
    before = BaseCommunicator.all_reduce, Carrying._sum
    BaseCommunicator.all_reduce = bare_all_reduce  # type: ignore[method-assign]
    Carrying._sum = bare_carried  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseCommunicator.all_reduce, Carrying._sum = before  # type: ignore[method-assign]


@contextmanager
def checked() -> Iterator[None]:
    before, _verdict._given = _verdict._given, True
    try:
        yield
    finally:
        _verdict._given = before


def carries() -> bool:
    return isinstance(syncbn.world(), syncbn.comm.Horovod)


def small_layer() -> Callable[[], None]:
    layer = syncbn.SyncBatchNorm(SHAPE[1])
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)

    def run() -> None:
        for _ in range(CALLS):
            layer(x).backward(dy)

    return run


def training_step() -> Callable[[], None]:
    net = syncbn.convert_sync_batchnorm(small_resnet(nn.BatchNorm2d))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x, labels = torch.randn(4, 3, 64, 64), torch.arange(4)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        syncbn.average_gradients(net)
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    comm = syncbn.init()
    torch.manual_seed(0)
    for title, run in {"small layer": small_layer(), "training step": training_step()}.items():
        variants = {"bare": within(bare, run), "as it is": run}
        if carries():
            variants["checked"] = within(checked, run)
        seconds = interleaved(variants, comm, args.repeats)
        if comm.rank == 0:
            ratios = {name: paired_ratio(seconds[name], seconds["bare"]) for name in variants if name != "bare"}
            told = ", ".join(f"{name} / bare {ratio:.3f}" for name, ratio in ratios.items())
            each = 1e6 * median(seconds["bare"]) / (CALLS if title == "small layer" else 1)
            print(f"{comm.transport}, {comm.size} ranks, {title}: bare {each:.0f} us; {told}", flush=True)


def within(context: Callable[[], Any], run: Callable[[], None]) -> Callable[[], None]:
    def inside() -> None:
        with context():
            run()

    return inside


if __name__ == "__main__":
    main()
