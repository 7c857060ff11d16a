"""Which launcher, and off it goes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import _horovodrun, _meeting, _mpirun, _slurm, _torchrun
from ._addresses import HostError
from ._command import Command, start
from ._options import JobOptions, Options, parse
from ._over_ssh import OverSsh
from ._slurm import Slurm, SlurmRank, run_task
from ._torchrun import Torchrun

# The options, what is said of them, and what makes the command of them. The last is for the tasks of srun.
LAUNCHERS: dict[str, tuple[type[Options], str, Callable[[Any], Command]]] = {
    "torchrun": (Torchrun, _torchrun.DESCRIPTION, _torchrun.torchrun),
    "mpirun": (OverSsh, _mpirun.DESCRIPTION, _mpirun.mpirun),
    "horovodrun": (OverSsh, _horovodrun.DESCRIPTION, _horovodrun.horovodrun),
    "slurm": (Slurm, _slurm.DESCRIPTION, _slurm.slurm),
    "slurm-rank": (SlurmRank, _slurm.RANK, _slurm.slurm_rank),
}
EPILOG = """SCRIPT is a Python script, or -m MODULE; it and the environment have the same path on every host. The
environment is that of the Python that runs this (launch/*.sh of the repository take .venv-syncbn, or what SYNCBN_VENV
names, if it is there). Each rank gets OMP_NUM_THREADS = cores / ranks of its host, unless that is set; and, on CPUs,
MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=9223372036854775807, with which it keeps the memory of freed tensors,
unless you set malloc yourself (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 leaves it as it is). A rank that fails ends the
whole job, and the exit status is then not 0."""
SUMMARY = f"""usage: syncbn launch LAUNCHER [OPTION ...] -- SCRIPT [ARGUMENT ...]

LAUNCHER is one of {", ".join(LAUNCHERS)}; LAUNCHER --help says more.

{EPILOG}"""


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the launcher that the command line names."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    try:
        if name == "agent":  # torchrun's
            _end(_last_words(run_agent(rest)))
        if name == "rank":  # the command of each of its ranks
            become_rank(rest)
        sys.exit(_launch(name, rest))
    except HostError as error:
        print(f"syncbn launch {'torchrun' if name == 'agent' else name}: error: {error}", file=sys.stderr, flush=True)
        _end(_last_words(1))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _end(status: int) -> NoReturn:
    """End, not by way of Python's end, where SIGTERM has its default again, and torch its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _launch(name: str, arguments: Sequence[str]) -> int:
    if name not in LAUNCHERS:
        asked = name in ("-h", "--help")
        print(
            SUMMARY if asked else f"{SUMMARY}\n\nno such launcher: {name!r}", file=sys.stdout if asked else sys.stderr
        )
        return 0 if asked else 2
    kind, description, command = LAUNCHERS[name]
    options = parse(kind, f"syncbn launch {name}", description, arguments, EPILOG)
    made = command(options)
    if isinstance(options, JobOptions):
        start(made, options)
    elif not options.dry_run:
        _end(run_task([*made.words, *options.script], {**os.environ, **made.settings}))
    else:
        print(made.text(options.script))
    return 0


def run_agent(arguments: Sequence[str]) -> int:
    """Run torchrun in this process, after what needs no torch."""
    place = list(arguments).index("--")
    meeting = _meeting.read(arguments[:place])
    server = None if meeting is None else meeting.come()
    # Of a lost connection torch's C++ code prints its own stack. For this process alone, not for its ranks.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from . import _agent

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    try:
        return _agent.main(arguments[place + 1 :], meeting, server)
    except HostError:
        raise
    except Exception:
        traceback.print_exc()
        return 1


def _last_words(status: int) -> int:
    """Give srun half a second to pass on what was printed last: see `run_task`."""
    if status != 0 and "SLURM_STEP_NUM_TASKS" in os.environ:
        time.sleep(0.5)
    return status


def become_rank(script: Sequence[str]) -> NoReturn:
    """Become Python with the script, which ends with its torchrun, be that killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    os.execv(sys.executable, [sys.executable, "-u", *script])
