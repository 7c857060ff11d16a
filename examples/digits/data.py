"""Canvases with real handwritten digits on a textured background, each photographed under a light of its own.

Every canvas is a pure function of (seed, split, index), so the data that a training step sees depend on neither the
number of processes nor on what was drawn before.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CANVAS = 64  # pixels, height and width
CLASSES = 10
HELD_OUT = 360  # the last digits of the data set appear on test canvases only
# Canvases differ from one another far more than one varies within itself (about 0.2), as films, scanners and days do.
CONTRAST_SPREAD = 0.5  # standard deviation of the contrast's logarithm
BRIGHTNESS_SPREAD = 1.5  # standard deviation of the brightness
SPLITS = {"train": 0, "test": 1}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Canvas:
    """One picture and its digits, of which there are K >= 1."""

    image: Array  # (CANVAS, CANVAS)
    boxes: Array  # (K, 4): left, top, right, bottom in pixels
    labels: NDArray[np.int64]  # (K,)


@cache
def _digits(split: str) -> tuple[Array, NDArray[np.int64]]:
    """Return the real digits of a split: ink (N, 8, 8) in 0..1, and labels (N,)."""
    data = load_digits()
    part = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
    return data.images[part] / 16, data.target[part].astype(np.int64)


def _resize(image: Array, height: int, width: int) -> Array:
    resized = F.interpolate(torch.from_numpy(image)[None, None], (height, width), mode="bilinear", align_corners=False)
    return resized[0, 0].numpy()


def _crop(ink: Array) -> Array:
    """Cut the empty margin off, so that the picture's edge is the digit's box."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _texture(rng: np.random.Generator) -> Array:
    """Return a background in 0..1: blotches of a random size under a fine grain of a random strength."""
    cells = rng.integers(3, 17)
    blotches = _resize(rng.uniform(0, 1, (cells, cells)), CANVAS, CANVAS)
    grain = rng.normal(0, rng.uniform(0.02, 0.1), (CANVAS, CANVAS))
    return np.clip(rng.uniform(0.1, 0.4) + 0.4 * (blotches - 0.5) + grain, 0, 1)


def _light(rng: np.random.Generator) -> tuple[Array, float]:
    """Return contrast (CANVAS, CANVAS), uneven across the canvas, and one brightness."""
    contrast = np.exp(rng.normal(0, CONTRAST_SPREAD))
    slope = np.add.outer(*(rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, CANVAS) for _ in range(2)))
    return contrast * (1 + slope), rng.normal(0, BRIGHTNESS_SPREAD)


def _overlaps(box: Array, boxes: list[Array]) -> bool:
    return any((box[:2] < other[2:]).all() and (other[:2] < box[2:]).all() for other in boxes)


def make_canvas(seed: int, split: str, index: int) -> Canvas:
    """Draw canvas `index` of a split: up to seven digits at random places and scales that do not overlap."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    inks, classes = _digits(split)
    image, boxes, labels = _texture(rng), [], []
    for _ in range(rng.integers(2, 8)):
        chosen = rng.integers(len(inks))
        ink = _crop(inks[chosen])
        scale = rng.uniform(2.0, 3.5)
        height, width = np.rint(scale * np.array(ink.shape)).astype(int)
        top, left = rng.integers(CANVAS - height), rng.integers(CANVAS - width)
        box = np.array([left, top, left + width, top + height], dtype=np.float64)
        if _overlaps(box, boxes):
            continue
        place = image[top : top + height, left : left + width]
        place += _resize(ink, height, width) * (rng.uniform(0.7, 1.0) - place)
        boxes.append(box)
        labels.append(classes[chosen])
    contrast, brightness = _light(rng)
    return Canvas(contrast * image + brightness, np.stack(boxes), np.array(labels))


def training_share(seed: int, step: int, rank: int, size: int, images: int) -> list[Canvas]:
    """Return this replica's canvases: a contiguous slice of the step's `size * images`, which no `size` changes."""
    first = (step * size + rank) * images
    return [make_canvas(seed, "train", index) for index in range(first, first + images)]
