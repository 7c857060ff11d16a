"""Which kernels work on the tensors of a call."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from torch import Tensor

from . import _composed, _torch
from ._protocol import Kernels

log = logging.getLogger("syncbn")


_sets: tuple[Kernels, ...] | None = None  # what comes before the composed kernels, once it is known


def kernels_for(*tensors: Tensor | None) -> Kernels:
    """Return the kernels for all the tensors of a call: input, gradient, parameters, buffers.

    They are the composed ones where no native set takes every tensor.
    """
    for kernels in _sets if _sets is not None else _choose():
        if kernels.takes(*tensors):
            return kernels
    return _composed


@contextlib.contextmanager
def composed_only() -> Iterator[None]:
    """Compute as SYNCBN_KERNELS=composed does, for comparison."""
    global _sets
    before, _sets = _sets, ()
    try:
        yield
    finally:
        _sets = before


def _choose() -> tuple[Kernels, ...]:
    """Look at the environment and the installation, once."""
    global _sets
    _sets = () if os.environ.get("SYNCBN_KERNELS") == "composed" else _installed()
    log.debug("kernels, in the order of choice: %s", ", ".join(kernels.__name__ for kernels in (*_sets, _composed)))
    return _sets


def _installed() -> tuple[Kernels, ...]:
    try:
        from . import _cpu
    except ImportError as error:  # a log record: as an exception, under python -W error, one rank would raise it alone
        log.warning(
            "syncbn was installed without its compiled CPU kernels and uses plain torch operations, several times "
            "slower: reinstall with a C++ compiler and without SYNCBN_BUILD_NATIVE=0 (%s)",
            error,
        )
        return (_torch,)
    return _cpu, _torch
