"""Which kernels work on the tensors of a call."""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from . import _composed, _torch
from ._protocol import Kernels


def kernels_for(*tensors: Tensor | None) -> Kernels:
    """Return the kernels for all the tensors of a call: input, gradient, parameters, buffers.

    They are the composed ones while torch.compile or torch.jit.trace looks on, where no native set takes every tensor,
    and where the environment says SYNCBN_KERNELS=composed.
    """
    if (
        os.environ.get("SYNCBN_KERNELS") == "composed"
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
    ):
        return _composed
    for kernels in _native_sets():
        if kernels.takes(*tensors):
            return kernels
    return _composed


@functools.cache
def _native_sets() -> tuple[Kernels, ...]:
    try:
        from . import _cpu
    except ImportError as error:  # a log record: as an exception, under python -W error, one rank would raise it alone
        logging.getLogger("syncbn").warning(
            "syncbn was installed without its compiled CPU kernels and uses plain torch operations, several times "
            "slower: reinstall with a C++ compiler and without SYNCBN_BUILD_NATIVE=0 (%s)",
            error,
        )
        return (_torch,)
    return _cpu, _torch
