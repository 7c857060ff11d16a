"""Real models: one training step on two processes with unequal images, against one process with the whole batch.

    launch/torchrun.sh --procs-per-node 2 -- benchmarks/real_models.py

Forward, backward and running statistics, in float64; dropout and stochastic depth off; random weights. Prints a table
and exits with 1 if a relative difference (largest difference over largest value, of a tensor) is above 1e-9.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn

BOUND = 1e-9
IMAGES = (1, 2)  # of each process


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    from torchvision import models

    plain: dict[str, Any] = {"num_classes": 5, "weights": None}
    for name in (
        *("resnet18", "resnet50", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small"),
        *("efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5", "vgg11_bn"),
    ):
        yield f"torchvision {name}", lambda name=name: models.get_model(name, **plain), (3, 64, 64)
    googlenet = {**plain, "aux_logits": False, "init_weights": False}
    yield "torchvision googlenet", lambda: models.googlenet(**googlenet), (3, 64, 64)
    for name in ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        yield (
            f"torchvision {name}",
            lambda name=name: models.get_model(name, weights=None, weights_backbone=None, num_classes=5),
            (3, 64, 64),
        )
    yield "torchvision r3d_18", lambda: models.video.r3d_18(**plain), (3, 4, 32, 32)


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    import timm

    for name in (
        *("mobilenetv3_small_050", "efficientnet_lite0", "resnet18d", "seresnet18", "regnetx_002", "repvgg_a0"),
        *("hrnet_w18_small", "dla34", "ghostnet_100", "mobilevit_xxs", "xception41", "ese_vovnet19b_dw"),
        *("hardcorenas_a", "resnet26t", "skresnet18", "darknet53"),
    ):
        yield f"timm {name}", lambda name=name: timm.create_model(name, num_classes=5, drop_rate=0.0), (3, 64, 64)
    yield "timm levit_128s", lambda: timm.create_model("levit_128s", num_classes=5), (3, 224, 224)


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    try:
        import transformers as hf
    except ImportError:
        return
    image = (3, 64, 64)
    yield "transformers ResNet", lambda: hf.ResNetModel(hf.ResNetConfig(hidden_sizes=[16, 32], depths=[2, 2])), image
    yield (
        "transformers RegNet",
        lambda: hf.RegNetModel(hf.RegNetConfig(hidden_sizes=[16, 32], depths=[2, 2], groups_width=8)),
        image,
    )
    yield "transformers MobileNetV2", lambda: hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.35)), image
    yield "transformers EfficientNet", lambda: hf.EfficientNetModel(hf.EfficientNetConfig()), image
    segformer = {"hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16, "num_labels": 4}
    yield (
        "transformers SegFormer",
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**segformer)),
        image,
    )


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = factory().double().train()
    for module in model.modules():
        if any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth")):
            module.eval()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the model's first tensor."""
    y: Any = model(x)
    while not isinstance(y, Tensor):
        y = next(iter(y.values())) if hasattr(y, "values") else y[0]
    return y


def step(model: nn.Module, x: Tensor, rows: slice) -> list[Tensor]:
    """Return output and input gradient; the loss weighs each number of the whole batch's output differently."""
    x = x.requires_grad_()
    y = output_of(model, x)
    weights = torch.randn(sum(IMAGES), *y.shape[1:], generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weights[rows]).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def relative(ours: Tensor, theirs: Tensor, scale: float) -> float:
    return (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), scale) if theirs.numel() else 0.0


def largest_difference(comm: Any, factory: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[float, int]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(IMAGES), *shape, generator=generator, dtype=torch.float64)
    images = images * torch.linspace(1, 2, len(images), dtype=torch.float64).view(-1, *[1] * len(shape))
    whole = made(factory)
    ours = syncbn.convert_sync_batchnorm(copy.deepcopy(whole))
    start = sum(IMAGES[: comm.rank])
    rows = slice(start, start + IMAGES[comm.rank])
    got = step(ours, images[rows].clone(), rows)
    expected = [tensor[rows] for tensor in step(whole, images.clone(), slice(None))]
    differences = [relative(a, b, 0.0) for a, b in zip(got, expected, strict=True)]
    # A bias in front of a norm layer has no gradient but rounding: compared with the largest gradient of all.
    largest = max(p.grad.abs().max().item() for p in whole.parameters() if p.grad is not None)
    for a, b in zip(ours.parameters(), whole.parameters(), strict=True):
        if b.grad is not None:
            assert a.grad is not None
            differences.append(relative(comm.all_reduce(a.grad.contiguous()), b.grad, 1e-3 * largest))
    differences += [relative(a.double(), b.double(), 0.0) for a, b in zip(ours.buffers(), whole.buffers(), strict=True)]
    norms = sum(isinstance(module, syncbn.SyncBatchNorm) for module in ours.modules())
    worst = torch.tensor([max(differences)], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item(), norms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains this")
    args = parser.parse_args()
    comm = syncbn.init()
    assert comm.size == len(IMAGES), f"start {len(IMAGES)} processes"
    models = [*torchvision_models(), *timm_models(), *transformers_models()]
    worst = 0.0
    if comm.rank == 0:
        print("| model | norm layers | largest relative difference |\n|---|---|---|")
    for name, factory, shape in models:
        if args.only in name:
            difference, norms = largest_difference(comm, factory, shape)
            worst = max(worst, difference)
            if comm.rank == 0:
                print(f"| {name} | {norms} | {difference:.0e} |", flush=True)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
