"""Triton's interpreter for the Triton kernels: programs one after another, on the CPU. See conftest.py."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from syncbn.kernels import _select, _triton

_one_at_a_time = threading.Lock()  # the interpreter patches triton.language while it runs: replicas are threads here


class Launcher:
    """A kernel of which one thread at a time launches one, and whose launches are counted."""

    def __init__(self, kernel: Any, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            with _one_at_a_time, np.errstate(all="ignore"):  # 1/0 is infinite on a GPU, without a warning
                self.launches.append(self.kernel.__name__)
                self.kernel[grid](*arguments, **constants)

        return launch


def install(patch: pytest.MonkeyPatch) -> list[str]:
    """Let the Triton kernels take the tensors of the CPU; return the list that records the names of those launched."""
    code, launches = pytest.importorskip("syncbn.kernels._triton_code", reason="triton is not installed"), []
    patch.setattr(_select, "_sets", (_triton,))
    patch.setattr(_triton, "_kept", {})
    round_to_nearest(patch)
    patch.setattr(_triton, "_serves", lambda device: device.type == "cpu")
    for name in ("moments", "normalize", "backward_sums", "backward_input"):
        patch.setattr(code, name, Launcher(getattr(code, name), launches))
    return launches


def round_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """Convert between float32 and bfloat16 as the compiled kernels do: the interpreter truncates, and loses NaN.

    That these round to nearest even, test_what_was_compiled sees in their code.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, before: Any, after: Any, mode: Any) -> Any:
        if (before.name, after.name) == ("fp32", "bf16"):
            return torch.from_numpy(np.array(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (before.name, after.name) == ("bf16", "fp32"):
            return torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16).float().numpy()
        return convert(values, before, after, mode)

    patch.setattr(interpreter, "_convert_float", rounded)


def small_tiles(patch: pytest.MonkeyPatch, *, programs: int = 6, tiles: int = 3) -> None:
    """Divide small tensors as large ones are: among several programs, each with several tiles."""
    patch.setattr(_triton, "TILE", 64)
    patch.setattr(_triton, "_COLUMNS", (4, 16, 64))
    patch.setattr(_triton, "_ROW_COLUMNS", (4, 16))
    patch.setattr(_triton, "_PROGRAMS", programs)
    patch.setattr(_triton, "_TILES", tiles)
    patch.setattr(_triton, "divide", _triton.divide.__wrapped__)
