"""Refuses a PyTorch that is older than pyproject.toml asks for, which pip lets pass where it is told --no-deps."""

from __future__ import annotations

import torch

__all__ = ["OLDEST", "refuse_older"]

OLDEST = (2, 8)


def refuse_older(version: str) -> None:
    """Raise ImportError if this version of torch is older than OLDEST.

    By the numbers alone: pip counts a pre-release of 2.8, which some containers bring, as older.
    """
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"syncbn needs torch {OLDEST[0]}.{OLDEST[1]} or newer, and {version} is installed ({torch.__path__[0]}): "
            "pip install --upgrade torch"
        )


refuse_older(torch.__version__)
