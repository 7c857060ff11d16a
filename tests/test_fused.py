"""What only the fused path has: what it saves, when it is chosen, and its double backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn import functional
from syncbn.comm import SingleProcess, run_threads
from syncbn.kernels import kernels_for

pytest.importorskip("syncbn._native", reason="syncbn was installed without its compiled kernels")


def test_it_is_chosen_for_eager_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert kernels_for(x.to(dtype)) is not None
    assert kernels_for(x.to("meta")) is None
    assert kernels_for(nn.Buffer(x).as_subclass(type("Subclass", (Tensor,), {}))) is None
    assert torch.func.vmap(lambda row: torch.ones(()) * (kernels_for(row) is None))(x).all()
    monkeypatch.setenv("SYNCBN_KERNELS", "composed")
    assert kernels_for(x) is None


def test_it_keeps_the_input_and_2c_numbers() -> None:
    saved: list[Tensor] = []
    x = torch.randn(4, 8, 5, 4, requires_grad=True)
    weight, bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
    mean, var = torch.zeros(8), torch.ones(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.sync_batch_norm(x, mean, var, weight, bias)
    own = [t for t in saved if t.data_ptr() not in {x.data_ptr(), weight.data_ptr(), bias.data_ptr()}]
    assert sum(t.numel() for t in own) == 2 * 8 + 1  # mean, 1/√(σ²+ε), and the count
    assert not {t.data_ptr() for t in own} & {mean.data_ptr(), var.data_ptr()}


class Counting(SingleProcess):
    def __init__(self) -> None:
        self.lengths: list[int] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.lengths.append(x.numel())
        return x


@pytest.mark.parametrize("size", [1, 3])
def test_double_backward_equals_composed(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient penalty, over replicas: ∂/∂θ of |∂L/∂x|²."""

    def replica(comm: syncbn.comm.Communicator) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(comm.rank)  # the default one is shared by all threads
        x = torch.randn(3 + comm.rank, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
        weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        bias = torch.tensor([0.1, -1.0], dtype=torch.float64, requires_grad=True)
        y = functional.sync_batch_norm(x, None, None, weight, bias, process_group=comm)
        (dx,) = torch.autograd.grad((y.tanh() * torch.arange(4.0)).sum(), x, create_graph=True)
        dx.square().sum().backward()
        return x.grad, weight.grad, bias.grad

    fused = run_threads(size, replica)
    monkeypatch.setenv("SYNCBN_KERNELS", "composed")
    for ours, reference in zip(fused, run_threads(size, replica), strict=True):
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_create_graph_issues_no_further_forward_collective() -> None:
    comm = Counting()
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    y = functional.sync_batch_norm(x, process_group=comm)
    torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert comm.lengths == [7, 6]


def test_an_unused_output_still_answers_its_peers() -> None:
    """A rank whose loss multiplies y by zero runs its backward; one that drops the gradient in between, too."""

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> None:
            return None

    comm = Counting()
    x = torch.randn(4, 3, requires_grad=True)
    y = functional.sync_batch_norm(x, process_group=comm)
    Drop.apply(y).sum().backward()
    assert comm.lengths in ([7, 6], [7])


def test_both_paths_agree_in_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        layer = syncbn.SyncBatchNorm(5)
        x = torch.randn(4, 5, 6, 3, requires_grad=True)
        for _ in range(3):
            (layer(x) * torch.randn(4, 5, 6, 3)).sum().backward()
        return [x.grad, *[p.grad for p in layer.parameters()], *layer.buffers()]

    fused = run()
    monkeypatch.setenv("SYNCBN_KERNELS", "composed")
    for a, b in zip(fused, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_compiled_kernels_it_says_so_once() -> None:
    code = (
        "import sys, warnings; sys.modules['syncbn._native'] = None\n"
        "import torch, syncbn\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    layer = syncbn.SyncBatchNorm(3)\n"
        "    [layer(torch.randn(2, 3)) for _ in range(3)]\n"
        "assert len(seen) == 1 and 'compiled CPU kernels' in str(seen[0].message), seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
