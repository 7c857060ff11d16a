"""The benchmark's training step: a small ResNet under each norm layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from syncbn.comm import Communicator

from ._measure import device, interleaved, median, paired_ratio

Record = dict[str, Any]


Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )  # fmt: skip
        self.norm: Any = norm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return body + shortcut, rectified."""
        return torch.relu(self.norm(self.body(x)) + self.shortcut(x))


class FusedBlock(Block):
    """The same of norm layers that add and rectify in their own passes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__(inputs, outputs, stride, norm)
        syncbn.fuse_activations(self)
        self.norm.activation = "relu"

    def forward(self, x: Tensor) -> Tensor:
        """Return body + shortcut, rectified."""
        y: Tensor = self.norm(self.body(x), self.shortcut(x))
        return y


def small_resnet(norm: Norm, block: type[Block] = Block) -> nn.Module:
    """Return a residual network of 15 convolutions and 11 norm layers for (N, 3, H, W)."""
    widths = [32, 32, 64, 64, 128, 128]
    blocks = [block(a, b, 1 if a == b else 2, norm) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), norm(widths[0]), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def resnet(comm: Communicator, repeats: int) -> Record:
    """Time a whole step of a small ResNet, two images a rank: forward, backward, gradients averaged, SGD."""
    fused = small_resnet(syncbn.SyncBatchNorm, FusedBlock)
    syncbn.fuse_activations(fused)  # the stem
    models = {
        "local": small_resnet(nn.BatchNorm2d),
        "sync": small_resnet(syncbn.SyncBatchNorm),
        "fused": fused,
        "none": small_resnet(lambda channels: nn.Identity()),
    }
    steps = {name: _training_step(model.to(device())) for name, model in models.items()}
    times = interleaved(steps, comm, repeats)
    return {
        "seconds": {name: median(t) for name, t in times.items()},
        "sync_to_local": paired_ratio(times["sync"], times["local"]),
        "fused_to_local": paired_ratio(times["fused"], times["local"]),
        "local_to_none": paired_ratio(times["local"], times["none"]),
    }


def _training_step(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(2, 3, 128, 128, device=device()), torch.tensor([1, 2], device=device())

    def step() -> None:
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        syncbn.average_gradients(model)
        optimizer.step()

    return step
