"""torch's own: DDP under its newer names, and FSDP2, in bfloat16 as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.comparison import (
    STEPS,
    batch,
    largest_difference,
    made,
    median_difference,
    mine,
    sgd,
    small_network,
    trained_on_whole_batches,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.comm import SingleProcess

models = pytest.importorskip("torchvision.models")


def _fit(model: nn.Module, rank: int | None) -> None:
    """Train on this rank's part; with None, alone on all."""
    part, group = (slice(None), SingleProcess()) if rank is None else (mine(rank), None)
    optimizer = sgd(model)
    for step in range(STEPS):
        images, labels = (whole[part] for whole in batch(step))
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(model(images).double(), labels, reduction="sum")
        syncbn.global_mean(total, len(images), process_group=group).backward()
        optimizer.step()


def _ddp(rank: int, size: int) -> float:
    model = made(small_network)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(model), forward_sync_buffers=False)
    _fit(model, rank)
    return largest_difference(model, trained_on_whole_batches(small_network))


def test_ddp_with_unequal_images(agrees) -> None:
    agrees(_ddp)


def _shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    for stage in (model.stage2, model.stage3, model.stage4):
        fully_shard(stage, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _fsdp(rank: int, size: int) -> float:
    model = made(small_network)
    model = syncbn.convert_sync_batchnorm(model)
    _shard(model, init_device_mesh("cpu", (size,)))
    _fit(model, rank)
    return largest_difference(model, trained_on_whole_batches(small_network))


def test_fsdp2_with_unequal_images(agrees) -> None:
    agrees(_fsdp)


def _bfloat16(rank: int, size: int) -> list[float]:
    """Differences to float64: of two processes, of one with the whole batch, of two with local statistics."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("ranks", "alone"))
    expected = trained_on_whole_batches(small_network)
    found = []
    # nn.BatchNorm2d takes no bfloat16 parameters beside float32 statistics on a CPU: also alone, the layers are ours.
    for group, ranks, part in (
        (None, "ranks", rank),
        (SingleProcess(), "alone", None),
        (SingleProcess(), "ranks", rank),
    ):
        model = made(small_network).float()
        _shard(syncbn.convert_sync_batchnorm(model, group), mesh[ranks], mp_policy=policy)
        _fit(model, part)
        found.append(median_difference(model, expected))
    return found


def test_fsdp2_in_bfloat16(gloo, note) -> None:
    ours, alone, local = gloo(2, _bfloat16, seconds=120)[0]
    note(ours)
    assert ours < 1.5 * alone
    assert local > 3 * alone
