"""Which kernels work on the tensors of a call."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from torch import Tensor

from .._compiled import REINSTALL, absence, native
from .._plain import are_plain
from ..errors import KernelsError
from . import _composed, _torch, _triton
from ._protocol import Kernels

log = logging.getLogger("syncbn")

CHOICES = "compiled (CPU), triton (CUDA), torch (CUDA, PyTorch's own) or composed (everywhere), or unset it"

_sets: tuple[Kernels, ...] | None = None  # what comes before the composed kernels, once it is known
_named = ""  # the one set that SYNCBN_KERNELS asks for, unless that is the composed one
_said_slow = False


def kernels_for(*tensors: Tensor | None) -> Kernels:
    """Return the kernels for all the tensors of a call: input, gradient, parameters, buffers.

    They are the composed ones where no native set takes every tensor.

    Raises:
        KernelsError: SYNCBN_KERNELS names kernels that are unknown, cannot be had, or do not work on the device of the
            first tensor. (Tensors that are more than memory go to the composed kernels all the same.)
    """
    for kernels in _sets if _sets is not None else _choose():
        if kernels.takes(*tensors):
            return kernels
    if _named:
        _refuse_plain(tensors)
    elif native is None and _sets:
        _say_slow(tensors)
    return _composed


@contextlib.contextmanager
def composed_only() -> Iterator[None]:
    """Compute as SYNCBN_KERNELS=composed does, for comparison."""
    global _sets, _named
    before, (_sets, _named) = (_sets, _named), ((), "")
    try:
        yield
    finally:
        _sets, _named = before


def _choose() -> tuple[Kernels, ...]:
    """Look at the environment and the installation, once."""
    global _sets, _named
    setting = os.environ.get("SYNCBN_KERNELS", "")
    _sets, _named = (_the(setting), setting) if setting else (_installed(), "")
    if setting == "composed":
        _named = ""
    log.debug("kernels, in the order of choice: %s", ", ".join(kernels.__name__ for kernels in (*_sets, _composed)))
    return _sets


def _the(name: str) -> tuple[Kernels, ...]:
    """Return the set of this name."""
    if name == "composed":
        return ()
    if name == "torch":
        return (_torch,)
    if name == "triton":
        if problem := _triton.problem():
            raise KernelsError(f"SYNCBN_KERNELS=triton: {problem}, or set SYNCBN_KERNELS to {CHOICES}")
        return (_triton,)
    if name == "compiled":
        if native is None:
            raise KernelsError(
                f"SYNCBN_KERNELS=compiled: syncbn has no compiled CPU kernels, as {absence}: {REINSTALL}; or set "
                f"SYNCBN_KERNELS to {CHOICES}"
            )
        from . import _cpu

        return (_cpu,)
    raise KernelsError(f"SYNCBN_KERNELS={name} names no kernels: set it to {CHOICES}")


def _refuse_plain(tensors: tuple[Tensor | None, ...]) -> None:
    """Raise KernelsError if the tensors are no more than memory of a device: the named kernels are those of another."""
    device = next(t.device for t in tensors if t is not None)
    if device.type in ("cpu", "cuda", "xpu", "mps") and are_plain(tensors, device.type):
        raise KernelsError(
            f"SYNCBN_KERNELS={_named}: these kernels do not work on {device.type}, where the input is: move the model "
            f"and its input, or set SYNCBN_KERNELS to {CHOICES}"
        )


def _installed() -> tuple[Kernels, ...]:
    if native is None:
        return _triton, _torch
    from . import _cpu

    return _cpu, _triton, _torch


def _say_slow(tensors: tuple[Tensor | None, ...]) -> None:
    """Log once what is missing, when there is the first call that it would have served."""
    global _said_slow
    if _said_slow or not are_plain(tensors, "cpu"):
        return
    _said_slow = True
    # A log record: as an exception, under python -W error, one rank would raise it alone.
    log.warning(
        "syncbn computes with plain torch operations, several times slower than its compiled CPU kernels, and adds "
        "over sockets rather than in shared memory, as %s: %s",
        absence,
        REINSTALL,
    )
