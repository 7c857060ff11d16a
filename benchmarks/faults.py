"""What each way of losing a rank prints, and how soon the job has ended: 3 ranks, the fault on rank 1 in step 8.

    python benchmarks/faults.py [--launcher NAME ...] [--fault NAME ...] [--output FILE]

Runs tests/jobs/fault_job.py through the project's launch scripts, with `init(timeout=6 s)`. The seconds are those from
the fault until no process of the job is left; what is printed goes to the output file (runs/faults.txt), whole.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ("torchrun", {}),
    "torchrun, sockets": ("torchrun", {"SYNCBN_SHARED_MEMORY": "0"}),
    "mpirun": ("mpirun", {}),
    "horovodrun": ("horovodrun", {}),
}
FAULTS = (
    "raise",
    "kill",
    "kill:forward",
    "kill:backward",
    "stop",
    "stop:backward",
    "sys-exit",
    "os-exit",
    "skip",
    "order",
    "eval",
    "sleep",
    "fewer",
)
PATIENCE = 90
SAID = re.compile(
    r"MismatchError|PeerLostError|ValueError: the fault|has waited|exit(?:ed|s)? (?:with|on)|Signal|signal"
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/faults.txt")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w") as output:
        for fault in args.fault:
            for launcher in args.launcher:
                seconds, status, text = run(launcher, fault)
                print(
                    f"===== {fault}, {launcher}: {seconds:.1f} s, exit status {status}\n{text}", file=output, flush=True
                )
                print(f"{fault:14} {launcher:18} {seconds:5.1f} s  status {status:3}  {said(text)}", flush=True)


def run(launcher: str, fault: str) -> tuple[float, int, str]:
    """Return the seconds from the fault to the end of the last process, the exit status and what was printed."""
    script, variables = LAUNCHERS[launcher]
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        marker, printed = Path(folder) / "marker", Path(folder) / "printed"
        command = ["bash", f"launch/{script}.sh", "--procs-per-node", "3", "--", "tests/jobs/fault_job.py", fault]
        environment = {**os.environ, **variables, "SYNCBN_FAULT_JOB": token, "OMP_NUM_THREADS": "1"}
        with printed.open("w") as out:
            job = subprocess.Popen(
                [*command, "--marker", str(marker)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            deadline = time.monotonic() + PATIENCE
            while (job.poll() is None or processes(token)) and time.monotonic() < deadline:
                time.sleep(0.05)
        ended = time.time()
        for process in processes(token):
            os.kill(process, signal.SIGKILL)
        job.wait()
        seconds = ended - marker.stat().st_mtime if marker.exists() else float("nan")
        return seconds, job.returncode, printed.read_text()


def processes(token: str) -> list[int]:
    """Return the living processes that have the token in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (path / "environ").read_bytes() and ") Z " not in (path / "stat").read_text():
                found.append(int(path.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def said(text: str) -> str:
    """Return the first line that says what happened."""
    lines = [line.strip() for line in text.splitlines() if SAID.search(line)]
    return lines[0][:200] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
