"""Two models after the same training, compared; and a model for the libraries that bring none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn

NEGLIGIBLE = 1e-3


def largest_difference(ours: nn.Module, whole: nn.Module) -> float:
    """Return the largest of max|a - b| / max|b| over parameters and buffers, by position: wrappers rename.

    A tensor whose values are all below NEGLIGIBLE counts as if they reached it: a bias before batch norm has no
    gradient but rounding, and a difference relative to that says nothing.
    """
    pairs = zip(_tensors(ours), _tensors(whole), strict=True)
    return max((a - b).abs().max().item() / max(b.abs().max().item(), NEGLIGIBLE) for a, b in pairs if b.numel())


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return [t.detach().double() for t in (*model.parameters(), *model.buffers())]


def made(factory: Callable[[], nn.Module]) -> Any:
    """Return the model with the same random weights in every call, in float64 and training mode."""
    torch.manual_seed(0)
    return factory().double().train()


def random_images(step: int, *shape: int) -> Tensor:
    """Draw images that differ in brightness, so that local statistics would show."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return images * torch.linspace(1, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))


def with_local_statistics(rank: int, size: int, job: Callable[..., float], *args: Any) -> float:
    """Run a job whose call of `syncbn.convert_sync_batchnorm` does nothing: the negative control."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syncbn, "convert_sync_batchnorm", lambda module, *_, **__: module)
        return job(rank, size, *args)
