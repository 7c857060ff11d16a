"""Which kernels take a tensor, if any."""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from . import _cuda
from ._protocol import Kernels


def kernels_for(x: Tensor) -> Kernels | None:
    """Return the kernels for `x`, or None where the composed definition is to do the work.

    None while torch.compile, torch.jit.trace or a torch.func transform looks on, for tensor subclasses (DTensor, fake
    tensors), for devices and dtypes without kernels, and where the environment says SYNCBN_KERNELS=composed.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or os.environ.get("SYNCBN_KERNELS") == "composed"
    ):
        return None
    if x.is_cuda:
        return _cuda if x.dtype in _cuda.DTYPES else None
    if x.device.type == "cpu":
        kernels = _compiled()
        return kernels if kernels is not None and x.dtype in kernels.DTYPES else None
    return None


@functools.cache
def _compiled() -> Kernels | None:
    """Return the compiled CPU kernels; None, said once, where the library was installed without them."""
    try:
        from . import _cpu
    except ImportError as error:
        warnings.warn(
            f"syncbn was installed without its compiled CPU kernels and uses plain torch operations, several times "
            f"slower: reinstall with a C++ compiler and without SYNCBN_BUILD_NATIVE=0 ({error})",
            stacklevel=5,
        )
        return None
    return _cpu
