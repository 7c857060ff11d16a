"""What malloc's settings do to a training step on CPUs: its time, its page faults, and the peak memory of a rank.

    python benchmarks/allocator.py

ResNet-18, 4 images of 224 x 224 a rank, synchronised, 2 ranks of one thread. Each variant is a job of its own, as these
settings are read when a process starts; the jobs run interleaved, in another order in each round. jemalloc and tcmalloc
take part where they are installed. A round takes a minute and a half on an idle machine. On a busy one the processor
time (which counts what a rank waits awake, too) says more than the time.
"""

from __future__ import annotations

import argparse
import ctypes.util
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

# glibc takes blocks above a threshold, 32 MiB at most unless set, from the system one by one (mmap) and gives them back
# when they are freed, and what is free at the end of its heap, too (trim). Tensors then get fresh pages in each step.
HEAP = {"MALLOC_MMAP_MAX_": "0"}
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
KEEP = {"MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # madvise(MADV_HUGEPAGE)
VARIANTS = {
    "nothing set": {},
    "no trim": KEEP,
    "no mmap": HEAP,
    "mmap from 1 GiB, no trim": {**THRESHOLD, **KEEP},
    "no mmap, no trim": {**HEAP, **KEEP},
    "huge pages": HUGE,
    "no mmap, no trim, huge pages": {**HEAP, **KEEP, **HUGE},
}
VARIANTS |= {
    name: {"LD_PRELOAD": library}
    for name in ("jemalloc", "tcmalloc_minimal")
    if (library := ctypes.util.find_library(name)) is not None
}


FIGURES = ("seconds", "processor", "faults", "peak")  # means of the ranks; seconds, MB


def measure(steps: int) -> None:
    """One rank: print, for a step after three to warm up, medians of what it takes, and the peak of resident memory."""
    import torch
    from resnet18 import training_step

    import syncbn

    comm = syncbn.init()
    torch.manual_seed(0)
    step = training_step(syncbn.SyncBatchNorm)
    seen = []
    for _ in range(steps + 3):
        step()
        used = resource.getrusage(resource.RUSAGE_SELF)
        seen.append((time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt))
    pairs = list(itertools.pairwise(seen[2:]))
    figures = [statistics.median(b[i] - a[i] for a, b in pairs) for i in range(3)] + [used.ru_maxrss / 1e3]
    figures = (comm.all_reduce(torch.tensor(figures, dtype=torch.float64)) / comm.size).tolist()
    if comm.rank == 0:
        print(json.dumps(dict(zip(FIGURES, figures, strict=True))))


def job(settings: dict[str, str], steps: int) -> dict[str, float]:
    """Run a job of 2 ranks with these settings and no others of malloc."""
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--nproc-per-node=2", __file__, "--steps", str(steps), "--rank"]
    done = subprocess.run(command, env={**inherited, **ours, **settings}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each variant (3)")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured in each (8)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.steps)
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    shuffle = random.Random(0).shuffle
    for _ in range(arguments.rounds):
        order = list(VARIANTS)
        shuffle(order)
        for name in order:
            results[name].append(job(VARIANTS[name], arguments.steps))
            print(f"{name}: {results[name][-1]}", file=sys.stderr)
    table = Table(title="A training step of ResNet-18, 2 ranks x 1 thread, 4 x 224² each", title_justify="left")
    columns = (
        "malloc",
        "ms",
        "least to most",
        "/ nothing set",
        "processor ms",
        "/ nothing set",
        "page faults",
        "peak MB",
    )
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for name in VARIANTS:
        of = {figure: [run[figure] for run in results[name]] for figure in FIGURES}
        median = {figure: statistics.median(values) for figure, values in of.items()}
        ratio = {
            figure: statistics.median(a / b[figure] for a, b in zip(values, results["nothing set"], strict=True))
            for figure, values in of.items()
        }
        table.add_row(
            name, f"{median['seconds'] * 1e3:.0f}", f"{min(of['seconds']) * 1e3:.0f} to {max(of['seconds']) * 1e3:.0f}",
            f"{ratio['seconds']:.2f}", f"{median['processor'] * 1e3:.0f}", f"{ratio['processor']:.2f}",
            f"{median['faults']:.0f}", f"{median['peak']:.0f}",
        )  # fmt: skip
    Console(width=132).print(table)


if __name__ == "__main__":
    main()
