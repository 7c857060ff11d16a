"""examples/detect_digits.py, killed once. Arguments: STEP RANK PART WHO MARK, then those of the example.

In step STEP (the first is 0), after PART of the time that a step takes, rank RANK writes the file MARK and sends
SIGKILL: WHO is "rank" (to itself) or "job" (to all ranks and torchrun). Where MARK is there already, nothing is
killed.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import detect_digits

step, rank, part = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
who, mark = sys.argv[4], Path(sys.argv[5])
del sys.argv[1:6]


def victims() -> list[int]:
    """Process ids, our own last. torchrun's after the other ranks': with it the launcher's ranks get SIGTERM."""
    if who == "rank":
        return [os.getpid()]
    torchrun = os.getppid()
    ranks = [int(pid) for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()]
    return [*(pid for pid in ranks if pid != os.getpid()), torchrun, os.getpid()]


def kill() -> None:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    for pid in victims():
        os.kill(pid, signal.SIGKILL)


def train_step(training, args, comm):
    global seconds
    if len(training.losses) == step and comm.rank == rank:
        timer = threading.Timer(part * seconds, kill)
        timer.daemon = True
        timer.start()
    began = time.perf_counter()
    parts = whole_step(training, args, comm)
    seconds = time.perf_counter() - began
    return parts


seconds = 0.1  # that the last step took
whole_step, detect_digits.train_step = detect_digits.train_step, train_step
detect_digits.main()
