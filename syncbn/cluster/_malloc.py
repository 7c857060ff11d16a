"""Whether malloc gives the memory of large tensors back to the system, as glibc's does unless it is told otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping

# With any of them set, glibc adapts no threshold by itself any more.
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
# No block from mmap, no trim. MALLOC_MMAP_THRESHOLD_ would do too, but older releases take no more than 32 MiB.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "9223372036854775807"}
REMEDY = (
    f"set {' and '.join(f'{name}={value}' for name, value in KEEP.items())} before Python starts, as "
    "`syncbn launch` does"
)


def gives_memory_back(env: Mapping[str, str]) -> bool:
    """Tell whether it is glibc's and neither set nor replaced in `env`."""
    tuned = any(name in env for name in SETTINGS) or "glibc.malloc." in env.get("GLIBC_TUNABLES", "")
    replaced = "malloc" in env.get("LD_PRELOAD", "")
    return platform.libc_ver()[0] == "glibc" and not tuned and not replaced


def keep_memory(env: Mapping[str, str]) -> dict[str, str]:
    """Return what to set so that a rank keeps what it frees, where that is faster: docs/performance.md."""
    return KEEP if gives_memory_back(env) and not has_gpus(env) else {}


def has_gpus(env: Mapping[str, str]) -> bool:
    """Tell whether there are GPUs of NVIDIA or AMD here, and not hidden. Without torch, which takes seconds."""
    if env.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles"):
        return False
    if os.path.exists("/dev/kfd"):
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.stdout.startswith("GPU ")  # without a driver it says so, on stdout
