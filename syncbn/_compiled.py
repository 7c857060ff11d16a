"""The compiled module `syncbn._native`, or None where the library was installed without it."""

from __future__ import annotations

__all__ = ["native"]

INTERFACE = 6  # that of csrc/module.cpp: both are raised when what Python calls changes

try:
    from . import _native as native
except ImportError:  # no compiler, or SYNCBN_BUILD_NATIVE=0
    native = None  # type: ignore[assignment]
else:
    # An editable installation whose sources moved on: addresses would go where others are expected.
    if getattr(native, "INTERFACE", None) != INTERFACE:
        raise ImportError("syncbn._native was built from other sources: build it anew, bash launch/setup.sh")
