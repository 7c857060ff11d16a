"""torch.func and batched gradients: equal to nn.BatchNorm, or one clear error before any collective."""

from __future__ import annotations

import pytest
import torch
from reference import Unreachable, on_rows, random_batch, randomized
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from syncbn.comm import run_threads
from syncbn.errors import InputError


def loss(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor, g: Tensor) -> Tensor:
    return (torch.func.functional_call(layer, parameters, (x,)).tanh() * g).sum()


def test_func_grad_is_that_of_the_whole_batch() -> None:
    batch = random_batch([(4, 3, 2), (3, 3, 2)])

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm).double())
        parameters = dict(layer.named_parameters())
        x, g = batch.xs[comm.rank], batch.gs[comm.rank]
        return torch.func.grad(loss, argnums=(1, 2))(layer, parameters, x, g), layer.num_batches_tracked.item()

    whole = randomized(nn.BatchNorm1d(3)).double()
    xs = [x.clone().requires_grad_() for x in batch.xs]
    sum((y.tanh() * g).sum() for y, g in zip(on_rows(whole, xs), batch.gs, strict=True)).backward()
    results = run_threads(2, replica)
    for ((_, dx), tracked), x in zip(results, xs, strict=True):
        torch.testing.assert_close(dx, x.grad, rtol=1e-10, atol=1e-12)
        assert tracked == 1
    for name, p in whole.named_parameters():
        torch.testing.assert_close(sum(grads[name] for (grads, _), _ in results), p.grad, rtol=1e-10, atol=1e-12)


def test_grad_of_grad_is_that_of_the_whole_batch() -> None:
    batch = random_batch([(4, 3), (3, 3)])

    def penalty(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (layer(x).tanh() * g).sum())(x).square().sum()

    def replica(comm):
        layer = randomized(SyncBatchNorm(3, process_group=comm).double())
        return torch.func.grad(lambda x: penalty(layer, x, batch.gs[comm.rank]))(batch.xs[comm.rank])

    whole = randomized(nn.BatchNorm1d(3)).double()
    x, g = torch.cat(batch.xs).requires_grad_(), torch.cat(batch.gs)
    (dx,) = torch.autograd.grad((whole(x).tanh() * g).sum(), x, create_graph=True)
    dx.square().sum().backward()
    torch.testing.assert_close(torch.cat(run_threads(2, replica)), x.grad, rtol=1e-9, atol=1e-10)


UNSUPPORTED = {
    "vmap": lambda layer: torch.func.vmap(layer)(torch.randn(2, 4, 3)),
    "jvp": lambda layer: torch.func.jvp(layer, (torch.randn(4, 3),), (torch.randn(4, 3),)),
    "vmap of grad": lambda layer: torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(torch.randn(2, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch.func.jvp's own
@pytest.mark.parametrize("use", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_other_transforms_are_refused_before_any_collective(use) -> None:
    layer = SyncBatchNorm(3, process_group=Unreachable())
    with pytest.raises(InputError, match=r"cannot be used under torch.func.(vmap|jvp).*syncbn.reverted"):
        use(layer)
    assert layer.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_mode_without_torch_func_is_refused() -> None:
    import torch.autograd.forward_ad as forward_ad

    layer = SyncBatchNorm(3, process_group=Unreachable())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3))
        with pytest.raises(InputError, match="forward mode"):
            layer(dual)


def test_batched_gradients_are_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = SyncBatchNorm(3)(x)
    with pytest.raises(InputError, match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.randn(2, 4, 3), is_grads_batched=True)
