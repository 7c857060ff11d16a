"""Whether malloc gives the memory of large tensors back to the system, as glibc's does unless it is told otherwise."""

from __future__ import annotations

import platform
from collections.abc import Mapping

# launch/common.sh sets the first and the third. With any of them set, glibc adapts no threshold by itself any more.
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
REMEDY = "set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=9223372036854775807 before Python starts, as launch/*.sh do"


def gives_memory_back(env: Mapping[str, str]) -> bool:
    """Tell whether it is glibc's and neither set nor replaced in `env`."""
    tuned = any(name in env for name in SETTINGS) or "glibc.malloc." in env.get("GLIBC_TUNABLES", "")
    replaced = "malloc" in env.get("LD_PRELOAD", "")
    return platform.libc_ver()[0] == "glibc" and not tuned and not replaced
