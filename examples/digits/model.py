"""A compact anchor-free detector after CenterNet: Zhou et al., "Objects as Points", 2019, sections 3 and 4."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CANVAS, CLASSES, Canvas

STRIDE = 4  # canvas pixels per cell of the output maps
CELLS = CANVAS // STRIDE
SIZE_WEIGHT = 0.1  # of the size loss; heat map and offset weigh 1 (the paper's section 3)


def _block(inputs: int, outputs: int, stride: int, norm: bool) -> nn.Sequential:
    """Convolution, normalisation, ReLU; a bias before a normalisation would be subtracted again."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs) if norm else nn.Identity(), nn.ReLU())


class Detector(nn.Module):
    """Map (N, 1, CANVAS, CANVAS) to heat map logits (N, 10, CELLS, CELLS) and sizes and offsets (N, 2, CELLS, CELLS).

    A heat map peaks at the cell that holds a digit's centre; there, size is the box's (width, height) and offset the
    centre's place within the cell (x, y), all in cells.
    """

    def __init__(self, norm: bool = True, width: int = 64) -> None:
        super().__init__()
        # A cell of the last block sees 7 + 5 * 8 = 47 pixels: the largest digit and some background.
        self.backbone = nn.Sequential(
            _block(1, width // 2, 2, norm),
            _block(width // 2, width, 2, norm),
            *(_block(width, width, 1, norm) for _ in range(5)),
        )
        self.heatmap = nn.Conv2d(width, CLASSES, 1)
        self.size = nn.Conv2d(width, 2, 1)
        self.offset = nn.Conv2d(width, 2, 1)
        nn.init.constant_(self.heatmap.bias, -2.19)  # every cell starts at probability 0.1, as in focal loss

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.backbone(images)
        return self.heatmap(features), self.size(features), self.offset(features)


@dataclass(frozen=True)
class Targets:
    """What the detector should say about N canvases with K digits in all."""

    heatmap: Tensor  # (N, 10, CELLS, CELLS): 1 at the centres, a Gaussian around them
    cells: tuple[Tensor, Tensor, Tensor]  # image, row and column of each digit's centre, (K,) each
    sizes: Tensor  # (K, 2)
    offsets: Tensor  # (K, 2)

    @property
    def count(self) -> int:
        return len(self.sizes)


def images_of(canvases: Sequence[Canvas], like: Tensor) -> Tensor:
    """Return the pictures as (N, 1, CANVAS, CANVAS), with the dtype and device of `like`."""
    return torch.from_numpy(np.stack([canvas.image for canvas in canvases])).unsqueeze(1).to(like)


def targets_of(canvases: Sequence[Canvas], like: Tensor) -> Targets:
    """Return what the detector should answer, with the dtype and device of `like`."""
    boxes = torch.from_numpy(np.concatenate([canvas.boxes for canvas in canvases])) / STRIDE
    labels = torch.from_numpy(np.concatenate([canvas.labels for canvas in canvases]))
    image = torch.arange(len(canvases)).repeat_interleave(torch.tensor([len(canvas.labels) for canvas in canvases]))
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    column, row = centres.long().unbind(1)

    grid = torch.arange(CELLS)
    square = (grid - column[:, None, None]) ** 2 + (grid[:, None] - row[:, None, None]) ** 2  # (K, CELLS, CELLS)
    sigma = sizes.amax(1)[:, None, None] / 6  # three sigma reach the edge of the box
    heatmap = torch.zeros(len(canvases), CLASSES, CELLS, CELLS, dtype=boxes.dtype)
    for place, gaussian in zip(zip(image, labels, strict=True), torch.exp(-square / (2 * sigma**2)), strict=True):
        heatmap[place] = torch.maximum(heatmap[place], gaussian)

    cells = (image.to(like.device), row.to(like.device), column.to(like.device))
    return Targets(heatmap.to(like), cells, sizes.to(like), (centres - centres.floor()).to(like))


def _focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The paper's equation 1, summed: pixel-wise logistic regression, penalty-reduced around the centres."""
    probability = logits.sigmoid()
    at_centre = -((1 - probability) ** 2) * F.logsigmoid(logits)
    elsewhere = -((1 - target) ** 4) * probability**2 * F.logsigmoid(-logits)
    return torch.where(target == 1, at_centre, elsewhere).sum()


def summed_losses(predicted: tuple[Tensor, Tensor, Tensor], targets: Targets) -> Tensor:
    """Return (3,): heat map, size and offset loss, weighted, and summed (not averaged) over the digits."""
    heatmap, sizes, offsets = predicted
    image, row, column = targets.cells
    size_loss = F.l1_loss(sizes[image, :, row, column], targets.sizes, reduction="sum")
    offset_loss = F.l1_loss(offsets[image, :, row, column], targets.offsets, reduction="sum")
    return torch.stack([_focal_loss(heatmap, targets.heatmap), SIZE_WEIGHT * size_loss, offset_loss])
