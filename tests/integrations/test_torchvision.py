"""torchvision's detectors: full training steps, unequal numbers of images of other sizes, a rank without objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integrations.comparison import largest_difference, made, random_images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

torchvision = pytest.importorskip("torchvision")
detection = torchvision.models.detection
CHANNELS = 16
SIZES = [[(50, 64), (64, 48)], [(64, 64), (40, 56), (56, 40)]]  # of the images of each rank
SHAPES = {"min_size": 64, "max_size": 96, "size_divisible": 96}


def backbone() -> nn.Module:
    body = torchvision.models.resnet18(weights=None, norm_layer=nn.BatchNorm2d)
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return detection.backbone_utils.BackboneWithFPN(body, levels, [128, 256, 512], CHANNELS, norm_layer=nn.BatchNorm2d)


def anchors() -> Any:
    return detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4)


def retinanet() -> nn.Module:
    head = detection.retinanet.RetinaNetHead(CHANNELS, 3, 4, norm_layer=nn.BatchNorm2d)
    return detection.RetinaNet(backbone(), 4, anchor_generator=anchors(), head=head, **SHAPES)


def faster_rcnn() -> nn.Module:
    return detection.FasterRCNN(
        backbone(),
        rpn_anchor_generator=anchors(),
        box_head=detection.faster_rcnn.FastRCNNConvFCHead((CHANNELS, 7, 7), [16], [32], norm_layer=nn.BatchNorm2d),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 4),
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
        **SHAPES,
    )


def batch(step: int, empty: int) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Return the images and objects of each rank; those of the rank `empty` have no objects."""
    generator = torch.Generator().manual_seed(step)
    parts = []
    for rank, sizes in enumerate(SIZES):
        images, targets = [], []
        for height, width in sizes:
            images.append(random_images(7 * step + height + rank, 2, 3, height, width)[rank])
            objects = 0 if rank == empty else 2
            corner = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * 16
            extent = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * 16 + 8
            labels = torch.randint(1, 4, (objects,), generator=generator)
            targets.append({"boxes": torch.cat([corner, corner + extent], 1), "labels": labels})
        parts.append((images, targets))
    return parts


@contextlib.contextmanager
def comparable() -> Iterator[None]:
    """The samplers of anchors and proposals take the first, where they else draw; labels, in float32, follow suit."""
    entropy = nn.functional.binary_cross_entropy_with_logits

    def in_float64(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return entropy(x, labels.to(x), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", torch.arange)
        patch.setattr(nn.functional, "binary_cross_entropy_with_logits", in_float64)
        yield


def _train(rank: int, size: int, factory: Any, empty: int) -> float:
    with comparable():
        model = made(factory)
        model = syncbn.convert_sync_batchnorm(model)
        parallel = DistributedDataParallel(model)
        whole = made(factory)
        trained = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in (model, whole)]
        for step in range(2):
            parts = batch(step, empty)
            for optimizer in trained:
                optimizer.zero_grad()
            images, targets = parts[rank]
            losses = parallel(images, targets)
            # The losses are means over this rank's images: the mean over those of all ranks is their weighted mean.
            syncbn.global_mean(sum(losses.values()) * len(images), len(images)).backward()
            sum(whole(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]).values()).backward()
            for optimizer in trained:
                optimizer.step()
        return largest_difference(model, whole)


@pytest.mark.parametrize("empty", [-1, 1], ids=["objects everywhere", "a rank without objects"])
@pytest.mark.parametrize("factory", [retinanet, faster_rcnn])
def test_detection(agrees, factory: Any, empty: int) -> None:
    agrees(_train, factory, empty)
