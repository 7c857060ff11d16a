"""Interleaved timing: every variant once, again and again, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from syncbn.comm import Communicator

Variants = Mapping[str, Callable[[], object]]


def interleaved(variants: Variants, comm: Communicator, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of `repeats` runs of each variant, after one run each to warm up.

    In each repeat the order is another, the same on all ranks: what runs before leaves its data in the caches and its
    memory to the allocator. All ranks start each run together: a collective in one would else pay for a peer's delay
    in another.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffle = random.Random(0).shuffle
    for repeat in range(repeats + 1):
        order = list(variants)
        shuffle(order)
        for name in order:
            run = variants[name]
            comm.all_reduce(torch.zeros(1, device=device()))
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of runs that followed one another."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def device() -> str:
    """Return where the benchmark's tensors are."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
