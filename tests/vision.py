"""torchvision and timm, whose models the tests of conversion and fusion take."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch


def load(name: str) -> Any:
    """Import torchvision.models or timm; skip the test where it is not installed.

    The wheel of torchvision on PyPI is compiled for CUDA builds of torch. Beside a CPU build its compiled operators do
    not load, and then its Python part misses two names when it is imported: they are declared here, without code.
    """
    package = name.partition(".")[0]
    for needed in dict.fromkeys(["torchvision", package]):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
