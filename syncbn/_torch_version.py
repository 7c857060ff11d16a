"""Refuses a PyTorch that is older than pyproject.toml asks for, which pip lets pass where it is told --no-deps."""

from __future__ import annotations

import torch

__all__ = ["OLDEST"]

OLDEST = (2, 6)

# As numbers: pip counts a pre-release of 2.6, as some containers bring, as older.
if tuple(int(number) for number in torch.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"syncbn needs torch {OLDEST[0]}.{OLDEST[1]} or newer, and {torch.__version__} is installed "
        f"({torch.__path__[0]}): pip install --upgrade torch, or an older syncbn"
    )
