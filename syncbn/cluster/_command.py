"""The command that a launcher comes to: printed, tried with doctor, or become."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._addresses import HostError
from ._options import JobOptions

BARE = (sys.executable, str(Path(__file__).parent))  # runs this folder: see __main__.py
DOCTOR = ("-m", "syncbn", "doctor")


@dataclass(frozen=True)
class Command:
    """What is before the script, and which environment variables are set beside those that there are."""

    words: tuple[str, ...]
    settings: Mapping[str, str]

    def text(self, script: tuple[str, ...]) -> str:
        """Write it so that a shell can read it."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        return shlex.join(["env", *settings, *self.words, *script])


def start(command: Command, options: JobOptions) -> None:
    """Become the command with the script; before it, as the options say, run doctor in the same way, or only print.

    Raises:
        HostError: the preflight failed.
    """
    if options.dry_run:
        for script in (DOCTOR, options.script) if options.preflight else (options.script,):
            print(command.text(script))
        return
    env = {**os.environ, **command.settings}
    if options.preflight:
        status = run([*command.words, *DOCTOR], env)
        if status != 0:
            raise HostError(
                f"the preflight failed (exit status {status}), see above: {' '.join(options.script)} was not started"
            )
    os.execvpe(command.words[0], [*command.words, *options.script], env)


def run(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command to its end, also where this process is signalled; return its exit status, which is not 0 then.

    SIGTERM goes on to it. SIGINT, from a terminal, it has got already.
    """
    signals: list[int] = []
    with subprocess.Popen(words, env=env) as process:

        def note(number: int, frame: object) -> None:
            signals.append(number)
            if number == signal.SIGTERM:
                process.terminate()

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 + signals[0] if signals else status


def tool(name: str, remedy: str) -> str:
    """Return the path of a program, or raise a problem with the remedy."""
    found = find(name)
    if found is None:
        raise HostError(f"{name} not found: {remedy}")
    return found


def find(name: str) -> str | None:
    """Return the path of a program, looked for beside this Python first; None if it is nowhere."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")


def threads_each(ranks: int) -> int:
    """Return how many threads each of so many ranks of this host gets. A SLURM job may have less than the node."""
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    return max(1, cores // ranks)


def omp(threads: int) -> dict[str, str]:
    """Return the setting of OMP_NUM_THREADS: the user's own, if there is one."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}


def slurm_port() -> int | None:
    """Return a port of this SLURM job's own, if it is one. `syncbn.init` comes to the same number."""
    job = os.environ.get("SLURM_JOB_ID")
    return 20000 + int(job) % 10000 if job else None  # the system gives those from 32768 on to clients
