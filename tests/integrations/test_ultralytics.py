"""ultralytics: its trainer's own loop, on a tiny data set of files."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from integrations.comparison import largest_difference
from torch import nn

import syncbn

os.environ["YOLO_OFFLINE"] = "true"
ultralytics = pytest.importorskip("ultralytics")
import cv2  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402


class SyncTrainer(DetectionTrainer):
    def get_model(self, *args, **kwargs):
        return syncbn.convert_sync_batchnorm(super().get_model(*args, **kwargs))


class OnCPUs(SyncTrainer):
    """In float64; and what the trainer does on GPUs only: the same start, and the gradients of all ranks."""

    def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        model = super().get_model(*args, **kwargs).double()
        self.seen: list[dict[str, Any]] = []
        self.start = copy.deepcopy(model)
        return model

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        batch["img"] = batch["img"].double()
        self.seen.append({name: batch[name] for name in ("img", "cls", "bboxes", "batch_idx")})
        return batch

    def optimizer_step(self) -> None:
        syncbn.average_gradients(self.model)
        super().optimizer_step()


def _dataset(folder: Path, rank: int) -> Path:
    """Draw images of one rank, and a label for each: a class, and a box."""
    generator = np.random.default_rng(rank)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(4):
        image = generator.integers(0, 255 // (1 + rank), (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"images/{number}.png"), image)
        box = generator.uniform(0.3, 0.5, 4)
        (folder / f"labels/{number}.txt").write_text(f"{number % 2} {' '.join(map(str, box))}\n")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [a, b]\n")
    return data


def _train(rank: int, size: int, folder: Path) -> float:
    folder = folder / f"{len(list(folder.iterdir()))}-{rank}"
    settings = {"model": "yolo11n.yaml", "data": str(_dataset(folder, rank)), "project": str(folder), "imgsz": 64}
    settings |= {"epochs": 1, "batch": 2, "nbs": 2, "workers": 0, "device": "cpu", "val": False, "plots": False}
    settings |= {"optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0, "save": False, "amp": False, "weight_decay": 0.0}
    trainer = OnCPUs(overrides=settings)
    trainer.train()
    trainer.start.args = trainer.model.args
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, trainer.seen)
    return largest_difference(trainer.model, _whole(trainer.start, parts))


def _whole(model: nn.Module, parts: list[list[dict[str, Any]]]) -> nn.Module:
    """Train one process on the batches that the ranks drew; their losses have a normaliser of each rank."""
    syncbn.revert_sync_batchnorm(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.937, nesterov=True)
    criterion = model.init_criterion()
    for step in zip(*parts, strict=True):
        optimizer.zero_grad()
        maps = model(torch.cat([part["img"] for part in step]))
        counts = [len(part["img"]) for part in step]
        losses = [criterion(_split(maps, counts)[rank], part)[0].sum() for rank, part in enumerate(step)]
        (sum(losses) / len(losses)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        optimizer.step()
    return model


def _split(maps: Any, counts: list[int]) -> list[Any]:
    """Split what the model returns, a nest of dicts and lists, by images."""
    if isinstance(maps, torch.Tensor):
        return list(maps.split(counts))
    if isinstance(maps, dict):
        pieces = {name: _split(value, counts) for name, value in maps.items()}
        return [{name: piece[rank] for name, piece in pieces.items()} for rank in range(len(counts))]
    return [type(maps)(piece) for piece in zip(*(_split(value, counts) for value in maps), strict=True)]


def test_trainer(agrees, tmp_path: Path) -> None:
    agrees(_train, tmp_path)
