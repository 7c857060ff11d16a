"""DTensor inputs, sharded over the batch or over space, against one process with the whole batch."""

import contextlib
import threading

import pytest
import torch
from reference import assert_tensor_close, random_batch, randomized
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.comm import SingleProcess
from syncbn.comm._protocol import BaseCommunicator
from syncbn.errors import GroupError, InputError
from syncbn.functional import sync_batch_norm

SHAPE = (5, 3, 7, 4)  # nothing that two or four ranks divide, but the last
(X, RESIDUAL), (G, _) = random_batch([SHAPE, SHAPE], mean=3.0)
NAMES = ("y", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var", "num_batches_tracked")


@contextlib.contextmanager
def recorded():
    """Yield a list of (numbers, ranks), one pair for each all-reduce; without what the first one needs to be set up."""
    calls, all_reduce, inside = [], BaseCommunicator.all_reduce, threading.local()

    def recording(self, x, *place):
        nested, inside.it = getattr(inside, "it", False), True
        if not nested:
            calls.append((x.numel(), self.size))
        try:
            return all_reduce(self, x, *place)
        finally:
            inside.it = nested

    BaseCommunicator.all_reduce = recording
    try:
        yield calls
    finally:
        BaseCommunicator.all_reduce = all_reduce


def expected(activation):
    layer = randomized(nn.BatchNorm2d(3)).double()
    x, residual = X.clone().requires_grad_(), RESIDUAL.clone().requires_grad_()
    y = layer(x)
    if activation:
        y = torch.relu(y + residual)
    (y * G).sum().backward()
    return [y.detach(), x.grad, residual.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]


def train(rank, size, shape, placements, distributed, activation):
    """Return the whole of what NAMES says, and what was sent; the layer's tensors are DTensors if `distributed`."""
    mesh = init_device_mesh("cpu", shape)
    layer = randomized(SyncBatchNorm(3, activation="relu" if activation else None)).double()
    if distributed:
        distribute_module(layer, mesh)
    x, residual, g = (distribute_tensor(t, mesh, placements) for t in (X, RESIDUAL, G))
    x.requires_grad_()
    residual.requires_grad_()
    with recorded() as sent:
        y = layer(x, residual) if activation else layer(x)
        (y.to_local() * g.to_local()).sum().backward()
    assert (y.device_mesh, y.placements, y.shape, y.stride()) == (mesh, x.placements, x.shape, x.stride())
    assert y.to_local().shape == x.to_local().shape
    grads = [layer.weight.grad, layer.bias.grad]
    if not distributed:
        shares = [p if p.is_replicate() else Partial() for p in placements]
        grads = [DTensor.from_local(grad, mesh, shares) for grad in grads]
    whole = [y.detach(), x.grad, residual.grad, *grads, *layer.buffers()]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in whole], sent


PLACEMENTS = {
    "batch": (2, (2,), [Shard(0)], 2),
    "rows": (2, (2,), [Shard(2)], 2),
    "columns": (2, (2,), [Shard(3)], 2),
    "replicated": (2, (2,), [Replicate()], 1),
    "one rank without samples": (4, (4,), [Shard(0)], 4),
    "batch and rows": (4, (2, 2), [Shard(0), Shard(2)], 4),
    "batch twice": (4, (2, 2), [Shard(0), Shard(0)], 4),
    "batch, replicated": (4, (2, 2), [Shard(0), Replicate()], 2),
    "replicated, rows": (4, (2, 2), [Replicate(), Shard(2)], 2),
    "a part of the mesh": (4, (2, 1, 2), [Replicate(), Shard(2), Shard(0)], 2),
}


@pytest.mark.parametrize(("distributed", "activation"), [(True, False), (False, True)])
@pytest.mark.parametrize("case", PLACEMENTS)
def test_equal_to_the_whole_batch(gloo, case, distributed, activation):
    size, shape, placements, summed = PLACEMENTS[case]
    for actual, sent in gloo(size, train, shape, placements, distributed, activation):
        for name, a, e in zip(NAMES, actual, expected(activation), strict=True):
            assert (a is None) == (e is None), name
            if a is not None:
                assert_tensor_close(a, e, name=name)
        assert sent == [(2 * 3 + 1, summed), (2 * 3, summed)]


def _around(rank, size):
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    x = distribute_tensor(X, mesh, [Shard(0)])
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double())
    reference = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double()
    y, whole = model(x.clone()), reference(X)  # of an operation of DTensor's own
    assert_tensor_close(y.full_tensor(), whole)
    with torch.no_grad(), recorded() as sent:
        y, whole = model.eval()(x), reference.eval()(X)
        assert not sent
    assert y.placements == x.placements
    assert_tensor_close(y.full_tensor(), whole)


def test_inside_a_model_and_in_eval(gloo):
    gloo(2, _around)


def _masked(rank, size):
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.rand(5, 1, 7, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    expected_y = sync_batch_norm(X, mask=whole, process_group=SingleProcess())
    placements = [Shard(0), Shard(2)]
    x, mask = (distribute_tensor(t, mesh, placements) for t in (X, whole))
    assert_tensor_close(sync_batch_norm(x, mask=mask).full_tensor(), expected_y)
    for wrong in (whole, mask.full_tensor()[:, 0], distribute_tensor(whole, mesh, [Shard(2), Shard(0)])):
        with pytest.raises(InputError, match=r"expected (a )?mask"):
            sync_batch_norm(x, mask=wrong)


def test_a_mask_is_placed_as_the_input(gloo):
    gloo(4, _masked)


def _compiled(rank, size):
    mesh = init_device_mesh("cpu", (2, 2))
    x, g = (distribute_tensor(t, mesh, [Shard(0), Shard(2)]) for t in (X, G))
    x.requires_grad_()
    layer = randomized(SyncBatchNorm(3)).double()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    (y.to_local() * g.to_local()).sum().backward()
    return y.detach().full_tensor(), x.grad.full_tensor(), layer.running_var


def test_compiled_without_a_graph_break(gloo):
    y, dx, *_, running_var, _ = expected(activation=False)
    for actual in gloo(4, _compiled):
        for a, e in zip(actual, (y, dx, running_var), strict=True):
            assert_tensor_close(a, e)


def _refused(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    other = DeviceMesh("cpu", [1, 0])
    layer = SyncBatchNorm(3).double()
    sharded = distribute_tensor(X, mesh, [Shard(0)])
    before = [b.clone() for b in layer.buffers()]
    relu = SyncBatchNorm(3, activation="relu").double()
    by_rows = sharded.redistribute(mesh, [Shard(2)])
    by_channels = distribute_tensor(X, mesh, [Shard(1)])
    partial = DTensor.from_local(X, mesh, [Partial()])
    per_channel = distribute_tensor(torch.ones(3), mesh, [Shard(0)])
    elsewhere = distribute_module(SyncBatchNorm(3), other)
    of_a_node = SyncBatchNorm(3, process_group="node").double()
    for error, message, refused in [
        (
            InputError,
            r"got Shard\(dim=1\) over mesh dimension 0: redist",
            lambda: layer(by_channels),
        ),
        (InputError, r"got Partial\(sum\) over mesh dimension 0: redist", lambda: layer(partial)),
        (InputError, "expected residual placed as .*an ordinary tensor", lambda: relu(sharded, X)),
        (InputError, "expected residual placed as .*Shard.dim=2", lambda: relu(sharded, by_rows)),
        (InputError, "expected weight placed as .*Replicate.*got", lambda: elsewhere(sharded)),
        (InputError, "expected running_mean placed as .*Shard.dim=0", lambda: sync_batch_norm(sharded, per_channel)),
        (GroupError, "expected process_group=None for a DTensor", lambda: of_a_node(sharded)),
        (InputError, "2D or more", lambda: sync_batch_norm(per_channel)),
        (InputError, "weight of shape", lambda: SyncBatchNorm(4).double()(sharded)),
    ]:
        with recorded() as sent, pytest.raises(error, match=message):
            refused()
        assert not sent
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before, strict=True))


def test_what_cannot_be_normalised_is_refused_before_any_collective(gloo):
    gloo(2, _refused)


def _not_of_all_ranks(rank, size):
    mesh = DeviceMesh("cpu", torch.arange(4).view(1, 2, 2))  # of a world of 5
    if rank < 4:
        x = DTensor.from_local(X, mesh, [Shard(2), Shard(0), Shard(2)])
        with recorded() as sent, pytest.raises(GroupError, match="expected a mesh of all 5 ranks"):
            sync_batch_norm(x)
        assert not sent
        one = DTensor.from_local(X, mesh, [Shard(2), Shard(0), Replicate()])
        with recorded() as sent:
            sync_batch_norm(one)
        assert sent == [(7, 2)]


def test_several_dimensions_of_a_mesh_that_is_not_the_world(gloo):
    gloo(5, _not_of_all_ranks)
