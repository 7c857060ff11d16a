"""ResNet-18 as published (He et al. 2016, table 1), and a training step of it, for the benchmarks beside this file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import syncbn

Norm = Callable[[int], nn.Module]
STAGES = (64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)  # channels in and out, stride of the first block


class Block(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution beside them where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs),
        )  # fmt: skip
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.shortcut(x))


def resnet18(norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """The network for images (N, 3, 224, 224): 20 convolutions, 20 norm layers, 11.7 million parameters."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks = [Block(a, b, s, norm) for i, o, stride in STAGES for a, b, s in ((i, o, stride), (o, o, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def training_step(norm: Norm, images: int = 4) -> Callable[[], None]:
    """A function that does forward, backward, the averaging of the gradients and SGD on so many random images."""
    model = resnet18(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, labels = torch.randn(images, 3, 224, 224), torch.arange(images)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        syncbn.average_gradients(model)
        optimizer.step()

    return step
