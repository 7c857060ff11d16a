"""From output maps to boxes, and from boxes to average precision."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from .data import CANVAS, CLASSES, Canvas
from .model import CELLS, STRIDE, Detector, images_of

PER_IMAGE = 20  # detections kept on each canvas
Detections = NDArray[np.float64]  # (K, 6): left, top, right, bottom, score, class; best first


def _decode(heatmap: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """Return (N, PER_IMAGE, 6): the best peaks of the heat maps as boxes in pixels (the paper's section 3.1)."""
    scores = heatmap.sigmoid()
    scores = scores * (scores == F.max_pool2d(scores, 3, stride=1, padding=1))  # a peak tops its 8 neighbours
    score, index = scores.flatten(1).topk(PER_IMAGE)
    label, cell = index // CELLS**2, index % CELLS**2

    def at_cell(maps: Tensor) -> Tensor:  # (N, 2, CELLS, CELLS) -> (N, PER_IMAGE, 2)
        return maps.flatten(2).gather(2, cell[:, None].expand(-1, 2, -1)).transpose(1, 2)

    centre = torch.stack([cell % CELLS, cell // CELLS], 2) + at_cell(offset)
    half = at_cell(size).clamp(min=0) / 2
    corners = (torch.cat([centre - half, centre + half], 2) * STRIDE).clamp(0, CANVAS)
    return torch.cat([corners, score[..., None], label[..., None]], 2)


@torch.no_grad()
def detect(model: Detector, canvases: Sequence[Canvas]) -> list[Detections]:
    """Find the digits in evaluation mode, in which no norm layer communicates: any one replica may call this."""
    like = next(model.parameters())
    was_training = model.training
    model.eval()
    found = [_decode(*model(images_of(canvases[i : i + 32], like))) for i in range(0, len(canvases), 32)]
    model.train(was_training)
    return list(torch.cat(found).double().cpu().numpy())


def _with_sizes(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, 4) corners -> (K, 4) left, top, width, height, as COCO wants them."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:4] - boxes[:, :2]], 1)


def _ground_truth(canvases: Sequence[Canvas]) -> COCO:
    annotations = [
        {"image_id": image, "category_id": int(label), "bbox": box.tolist(), "area": box[2] * box[3], "iscrowd": 0}
        for image, canvas in enumerate(canvases)
        for box, label in zip(_with_sizes(canvas.boxes), canvas.labels, strict=True)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(canvases))],
        "categories": [{"id": label} for label in range(CLASSES)],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def average_precision(canvases: Sequence[Canvas], found: Sequence[Detections]) -> float:
    """Return the mean over the classes of COCO's average precision at IoU 0.5."""
    rows = [
        np.column_stack([np.full(len(boxes), image), _with_sizes(boxes), boxes[:, 4:]])
        for image, boxes in enumerate(found)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools narrates every step
        truth = _ground_truth(canvases)
        evaluation = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # (recall, class) at any area; -1 where a class is absent
    return float(precision[precision > -1].mean())
