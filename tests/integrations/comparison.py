"""Two models after the same training, compared; the data, and the training of the one process with the whole batch."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import syncbn
from syncbn import _torch_conversion

NEGLIGIBLE = 1e-3
STEPS = 3
UNEQUAL = (1, 3)  # images of each rank in a step
EQUAL = (2, 2)


def largest_difference(ours: nn.Module, whole: nn.Module) -> float:
    """Return the largest of max|a - b| / max|b| over parameters and buffers, by position: wrappers rename.

    A tensor whose values are all below NEGLIGIBLE counts as if they reached it: a bias before batch norm has no
    gradient but rounding, and a difference relative to that says nothing.
    """
    return max(_differences(ours, whole))


def median_difference(ours: nn.Module, whole: nn.Module) -> float:
    """Return the median instead, for formats in which a few tensors say nothing any more."""
    return statistics.median(_differences(ours, whole))


def _differences(ours: nn.Module, whole: nn.Module) -> list[float]:
    pairs = zip(_tensors(ours), _tensors(whole), strict=True)
    return [(a - b).abs().max().item() / max(b.abs().max().item(), NEGLIGIBLE) for a, b in pairs if b.numel()]


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).double() for t in tensors]


def made(factory: Callable[[], nn.Module]) -> Any:
    """Return the model with the same random weights in every call, in float64 and training mode."""
    torch.manual_seed(0)
    return factory().double().train()


def small_network() -> nn.Module:
    """Return a network of torchvision with 56 norm layers, for batches as `batch` makes them."""
    from torchvision.models import shufflenet_v2_x0_5

    return shufflenet_v2_x0_5(num_classes=3)  # type: ignore[no-any-return]


def random_images(step: int, *shape: int) -> Tensor:
    """Draw images that differ in brightness, so that local statistics would show."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return images * torch.linspace(1, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of all ranks."""
    return random_images(step, 4, 3, 48, 48), torch.tensor([0, 1, 2, 1])


def mine(rank: int, counts: tuple[int, ...] = UNEQUAL) -> slice:
    """Return where the part of this rank lies in a batch."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def trained_on_whole_batches(factory: Callable[[], nn.Module]) -> nn.Module:
    """Train on one process, with nn.BatchNorm: what must come out."""
    whole = made(factory)
    optimizer = sgd(whole)
    for images, labels in map(batch, range(STEPS)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(images), labels).backward()
        optimizer.step()
    return whole


@contextlib.contextmanager
def torchrun_variables(rank: int, size: int) -> Iterator[None]:
    """Tell a library that a launcher started the ranks, whose process group is there already."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
            patch.setenv(name, str(value))
        yield


def with_local_statistics(rank: int, size: int, job: Callable[..., float], *args: Any) -> float:
    """Run a job whose call of `syncbn.convert_sync_batchnorm` does nothing: the negative control."""
    with pytest.MonkeyPatch.context() as patch:
        for namespace in (syncbn, _torch_conversion):
            patch.setattr(namespace, "convert_sync_batchnorm", lambda module, *_, **__: module)
        return job(rank, size, *args)
