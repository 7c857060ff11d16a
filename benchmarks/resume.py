"""Kill a training at random points, resume it, and compare where it ends with the uninterrupted one.

    python benchmarks/resume.py --points 20
    SYNCBN_SHARED_MEMORY=0 python benchmarks/resume.py --points 20      # the same over sockets

Trains examples/detect_digits.py for a few steps, first undisturbed. Each point then kills by SIGKILL in a random step,
a random part of a step's time after it began: a rank, where torchrun starts all ranks again (--max-restarts); a rank,
where the same command is given again; or the whole job, torchrun and all ranks, where it is given again. Prints the
largest difference of final parameters and buffers. At the end trainings that are killed are resumed by other numbers of
processes. The exit status is not 0 if a difference is larger than it should be.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
IMAGES, STEPS, EVERY, PROCESSES = 6, 12, 2, 2  # of a whole batch; of a training; between checkpoints; of a job
RESTARTED, AGAIN, WHOLE = "rank killed, --max-restarts", "rank killed, by hand", "job killed, by hand"
NEVER = STEPS  # a step that is not reached


@dataclass(frozen=True)
class Point:
    """Where a training is killed."""

    way: str = RESTARTED
    step: int = NEVER
    rank: int = 0
    part: float = 0.0  # of a step's time

    @classmethod
    def draw(cls, way: str, first: int = 0) -> Point:
        return cls(way, random.randrange(first, STEPS - 1), random.randrange(PROCESSES), random.random())


def train(point: Point, folder: Path, dtype: str, processes: int = PROCESSES) -> subprocess.CompletedProcess[str]:
    """Give the command once."""
    torchrun = ["bash", "launch/torchrun.sh", "--procs-per-node", str(processes)]
    restarts = ["--max-restarts", "1" if point.way == RESTARTED else "0"]
    who = "job" if point.way == WHOLE else "rank"
    killed = ["tests/jobs/killed_job.py", *map(str, (point.step, point.rank, point.part, who, folder / "killed"))]
    example = ["--images-per-process", str(IMAGES // processes), "--steps", str(STEPS), "--dtype", dtype]
    rare = ["--checkpoint-every", str(EVERY), "--eval-every", str(STEPS), "--test-canvases", "1"]
    command = [*torchrun, *restarts, "--", *killed, *example, *rare, "--resume", "--output", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()}
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=180, check=False)


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    if len(state["losses"]) != STEPS:
        sys.exit(f"{folder} ended after {len(state['losses'])} steps")
    return dict(state["model"])


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)


def resumed(point: Point, folder: Path, dtype: str, processes: int = PROCESSES) -> tuple[str, dict[str, torch.Tensor]]:
    """Train, get killed and end; return after which step it was resumed, and the final tensors."""
    folder.mkdir()
    job = train(point, folder, dtype)
    if not (folder / "killed").exists():
        sys.exit(f"nothing was killed at {point}:\n{job.stdout}{job.stderr}")
    if point.way != RESTARTED:
        if job.returncode == 0:
            sys.exit(f"a killed job ended as if nothing had happened at {point}")
        job = train(point, folder, dtype, processes)
    if job.returncode != 0:
        sys.exit(f"not resumed at {point}:\n{job.stdout}{job.stderr}")
    lines = [line for line in job.stdout.splitlines() if line.startswith(("resuming", "no checkpoint"))]
    return lines[-1].removeprefix("resuming after ").removesuffix(f" of {STEPS}"), final(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20, metavar="N")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the points")
    args = parser.parse_args()
    random.seed(args.seed)
    points = [(Point.draw((RESTARTED, AGAIN, WHOLE)[number % 3]), PROCESSES) for number in range(args.points)]
    points += [(Point.draw(WHOLE, EVERY), processes) for processes in (1, 3)]
    table = Table(title=f"{args.dtype}, {STEPS} steps, a checkpoint every {EVERY}")
    for heading in ("way", "rank", "killed in step", "resumed from", "processes", "largest difference"):
        table.add_column(heading)
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        reference = train(Point(), Path(directory) / "undisturbed", args.dtype)
        if reference.returncode != 0:
            sys.exit(reference.stdout + reference.stderr)
        undisturbed = final(Path(directory) / "undisturbed")
        for number, (point, processes) in enumerate(points):
            begin, ours = resumed(point, Path(directory) / str(number), args.dtype, processes)
            apart = difference(ours, undisturbed)
            same = processes == PROCESSES
            wrong += apart != 0 if same else args.dtype == "float64" and apart > 1e-9
            victim = "all" if point.way == WHOLE else str(point.rank)
            numbers = f"{PROCESSES}" if same else f"{PROCESSES}, then {processes}"
            when, result = f"{point.step} + {point.part:.2f}", f"{apart:.1e}" if apart else "0"
            row = (point.way, victim, when, begin, numbers, result)
            table.add_row(*row)
            print(*row, sep=" | ", flush=True)
    Console(width=120).print(table)
    sys.exit(f"{wrong} of {len(points)} differ" if wrong else 0)


if __name__ == "__main__":
    main()
