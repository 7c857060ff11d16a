"""With DistributedDataParallel, FSDP2, torch.compile and torch.utils.checkpoint, over real processes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn

STEPS = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten(1),
        nn.Linear(12, 2),
    ).double()  # fmt: skip


def batch(step: int, images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return (
        torch.randn(images, 2, 6, 6, generator=generator, dtype=torch.float64),
        torch.randn(images, 2, generator=generator, dtype=torch.float64),
    )


def train(net: nn.Module, part: slice, images: int) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses, averaged over the ranks by the caller, and the final state."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        x, target = batch(step, images)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x[part]), target[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, net.state_dict()


def compare(rank: int, size: int, net: nn.Module, **prefix: str) -> None:
    images = 2 * size
    expected_losses, expected = train(model(), slice(None), images)
    losses, state = train(net, slice(2 * rank, 2 * rank + 2), images)
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / size, torch.tensor(expected_losses, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    for name, value in expected.items():
        found = state[prefix.get("prefix", "") + name]
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)


def _ddp(rank: int, size: int, options: dict[str, bool]) -> None:
    net = syncbn.convert_sync_batchnorm(model())
    compare(rank, size, DistributedDataParallel(net, broadcast_buffers=False, **options), prefix="module.")


@pytest.mark.parametrize("option", ["none", "find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_ddp_equals_big_batch_training(gloo, option: str) -> None:
    gloo(2, _ddp, {} if option == "none" else {option: True})


def _local(rank: int, size: int) -> None:
    with pytest.raises(AssertionError):
        compare(rank, size, DistributedDataParallel(model(), broadcast_buffers=False), prefix="module.")


def test_ddp_with_local_batch_norm_does_not(gloo) -> None:
    """Negative control: the comparison sees the difference."""
    gloo(2, _local)


def _average(rank: int, size: int) -> None:
    net = syncbn.convert_sync_batchnorm(model())
    if rank:
        for p in net.parameters():
            nn.init.zeros_(p)
    syncbn.broadcast_parameters(net)
    step = torch.optim.SGD.step

    class Averaging(torch.optim.SGD):
        def step(self):  # type: ignore[override]
            syncbn.average_gradients(net)
            return step(self)

    torch.optim.SGD, original = Averaging, torch.optim.SGD  # the loop of `train`, with our reduction
    try:
        compare(rank, size, net)
    finally:
        torch.optim.SGD = original


def test_average_gradients_equals_big_batch_training(gloo) -> None:
    gloo(2, _average)


def _fsdp(rank: int, size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    net = syncbn.convert_sync_batchnorm(model())
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    fully_shard(net, mesh=mesh)
    x, target = batch(0, 2 * size)
    part = slice(2 * rank, 2 * rank + 2)
    nn.functional.mse_loss(net(x[part]), target[part]).backward()
    whole = model()
    nn.functional.mse_loss(whole(x), target).backward()
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-10, atol=1e-10)


def test_fsdp2_equals_big_batch(gloo) -> None:
    gloo(2, _fsdp)


def _compiled(rank: int, size: int) -> None:
    torch._dynamo.reset()
    eager = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double())
    compiled_net = copy.deepcopy(eager)
    compiled = torch.compile(compiled_net, fullgraph=True, backend="aot_eager", dynamic=True)
    for images in (3, 2 + rank):
        x = torch.randn(images, 2, 6, 6, dtype=torch.float64)
        g = torch.randn(images, 3, 4, 4, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for net, leaf in zip((eager, compiled), inputs, strict=True):
            (net(leaf) * g).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, ours), theirs in zip(compiled_net.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))


def test_compile_without_a_graph_break(gloo) -> None:
    gloo(2, _compiled)


def _checkpointed(rank: int, size: int, reentrant: bool) -> None:
    def run(recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(rank)
        net = syncbn.convert_sync_batchnorm(model())
        x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
        y = checkpoint(net, x, use_reentrant=reentrant) if recompute else net(x)
        (y * torch.arange(4.0).view(2, 2)).sum().backward()
        return x.grad, net.state_dict()

    (plain_grad, plain), (grad, state) = run(False), run(True)
    torch.testing.assert_close(grad, plain_grad)
    for name, value in plain.items():
        assert torch.equal(state[name], value), name  # the statistics moved once


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_moves_the_statistics_once(gloo, reentrant: bool) -> None:
    gloo(2, _checkpointed, reentrant)
