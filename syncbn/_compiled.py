"""The compiled module `syncbn._native`, or None where this installation has none that works."""

from __future__ import annotations

from pathlib import Path

__all__ = ["REINSTALL", "absence", "native"]

INTERFACE = 6  # that of csrc/module.cpp: both are raised when what Python calls changes

# pip keeps the wheels that it has built: without --no-cache-dir it would take one without the compiled module again.
REINSTALL = (
    "pip install --force-reinstall --no-deps --no-cache-dir syncbn (in a clone bash launch/setup.sh), with a C++ "
    "compiler where there is no wheel for this platform, and without SYNCBN_BUILD_NATIVE=0"
)

absence = ""  # why `native` is None


def _reason(error: ImportError) -> str:
    if error.path is not None and error.path.endswith(".so"):  # it is there and does not load
        return f"its compiled module does not load: {error}"
    others = sorted(path.name for path in Path(__file__).parent.glob("_native.*.so"))
    if others:
        return f"its compiled module is for another Python: {', '.join(others)}"
    return "it was installed without its compiled module"


try:
    from . import _native as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    absence = _reason(error)
else:
    # Half replaced, or editable and its sources moved on: addresses would go where others are expected.
    if (built := getattr(native, "INTERFACE", None)) != INTERFACE:
        raise ImportError(
            f"syncbn._native was built from other sources (interface {built}, expected {INTERFACE}): {REINSTALL}"
        )
