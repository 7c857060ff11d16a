"""DTensor inputs: each rank works on its own part, and the sums go over the mesh dimensions that shard the input."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ._epilogue import Epilogue
from ._statistics import Running
from .comm._groups import alone, key_of, key_of_parts
from .errors import GroupError, InputError


def locally(
    normalise: Callable[[Tensor, Epilogue, Running, Tensor | None], Tensor],
    input: DTensor,
    epilogue: Epilogue,
    running: Running,
    mask: Tensor | None,
) -> Tensor:
    """Apply `normalise` to this rank's parts; return the DTensor that the ranks' results are, placed like `input`.

    Weight, bias and running statistics are ordinary tensors, or DTensors replicated over the same mesh. Of the latter
    the gradient is the sum over the mesh dimensions that shard `input`; of the former it is this rank's share.

    Raises:
        InputError: an input that holds partial sums or a part of the channels; a residual or a mask, which is to be
            (N, 1, *), that is placed otherwise; a weight, bias or running statistics that are not replicated over the
            input's mesh.
    """
    shares = [_share(dim, placement) for dim, placement in enumerate(input.placements)]
    residual = epilogue.residual
    if residual is not None:
        residual = _placed("residual", residual, input, input.placements).to_local()
    if mask is not None:
        if mask.dim() != input.dim():
            raise InputError(
                f"expected a mask (N, 1, *) for a DTensor, got {tuple(mask.shape)}: pass mask.unsqueeze(1)"
            )
        mask = _placed("mask", mask, input, input.placements).to_local()
    weight, bias = (
        _replica(name, t, input, shares) for name, t in (("weight", epilogue.weight), ("bias", epilogue.bias))
    )
    with torch.no_grad():  # which gives the memory itself
        mean = _replica("running_mean", running.mean, input, shares)
        var = _replica("running_var", running.var, input, shares)
        batches = _replica("num_batches_tracked", running.batches, input, shares)
    parts = Epilogue(weight, bias, residual, epilogue.activation)
    y = normalise(input.to_local(), parts, Running(mean, var, batches, running.momentum), mask)
    return DTensor.from_local(y, input.device_mesh, input.placements, shape=input.shape, stride=input.stride())


def _share(dim: int, placement: Placement) -> Placement:
    """Return the placement of a parameter's gradient over a mesh dimension, from that of the input."""
    if isinstance(placement, Replicate):
        return placement
    if isinstance(placement, Shard) and placement.dim != 1:
        return Partial()
    raise InputError(
        f"expected an input that is replicated, or sharded over the batch or space, got {placement!r} over mesh "
        f"dimension {dim}: redistribute it; or, of channels, give input.to_local() to a layer of this rank's channels"
    )


def _replica(name: str, tensor: Tensor | None, input: DTensor, shares: list[Placement]) -> Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor
    return _placed(name, tensor, input, (Replicate(),) * len(shares)).to_local(grad_placements=shares)


def _placed(name: str, tensor: Tensor, input: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    mesh = input.device_mesh
    if isinstance(tensor, DTensor) and tensor.device_mesh == mesh and tensor.placements == placements:
        return tensor
    came = f"{tensor.placements} over {tensor.device_mesh}" if isinstance(tensor, DTensor) else "an ordinary tensor"
    raise InputError(f"expected {name} placed as {placements} over {mesh}, got {came}: redistribute it")


def group_of(input: DTensor, group: str) -> str:
    """Return the key of the ranks that share the batch of `input`: those along the mesh dimensions that shard it.

    Raises:
        GroupError: `group` is not the world, which stands for the mesh's own; or several dimensions shard the input,
            and the mesh does not hold all ranks.
    """
    if group != "world":
        raise GroupError("expected process_group=None for a DTensor, whose mesh says which ranks share the batch")
    mesh = input.device_mesh
    dims = [dim for dim, placement in enumerate(input.placements) if placement.is_shard() and mesh.size(dim) > 1]
    if not dims:
        return alone.key
    if len(dims) == 1:
        return key_of(mesh.get_group(dims[0]))
    if mesh.size() != dist.get_world_size():
        raise GroupError(
            f"expected a mesh of all {dist.get_world_size()} ranks for an input that several of its dimensions shard, "
            f"got {mesh}: shard by one dimension"
        )
    return _key_over(mesh, tuple(dims))  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_over(mesh: DeviceMesh, dims: tuple[int, ...]) -> str:
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    ranks = mesh.mesh.permute(*others, *dims).reshape(-1, math.prod(mesh.size(dim) for dim in dims))
    return key_of_parts(ranks.tolist())
