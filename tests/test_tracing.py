"""What others make of a model by following it: torch.fx, torch.jit, torch.export, fake tensors and dispatch modes."""

from __future__ import annotations

import copy
import io

import onnx
import pytest
import torch
from reference import Unreachable, randomized
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.comm import SingleProcess
from syncbn.errors import ConversionError


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), randomized(nn.BatchNorm2d(3)), nn.ReLU())


def images() -> Tensor:
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def assert_trains_as_nn(net: nn.Module, **tolerance: float) -> None:
    """One forward and backward give what nn.BatchNorm2d gives."""
    theirs = model()
    ys = [m(images()) for m in (net, theirs)]
    for y in ys:
        (y * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(*ys, **tolerance)
    for ours, expected in zip(net.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(net.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)


# torch.fx


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_a_leaf_of_torch_fx(training: bool) -> None:
    net = convert_sync_batchnorm(nn.Sequential(model(), SyncBatchNorm(3))).train(training)
    traced = torch.fx.symbolic_trace(net)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == ["0.0", "0.1", "0.2", "1"]
    x = images()
    assert torch.equal(traced(x), copy.deepcopy(net)(x))


# torch.jit


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script_says_to_revert_first() -> None:
    net = convert_sync_batchnorm(model())
    with pytest.raises(ConversionError, match=r"torch.jit.script.*script syncbn.reverted\(model\)"):
        torch.jit.script(net)
    torch.jit.script(syncbn.revert_sync_batchnorm(net))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("saved", [False, True])
def test_a_trace_trains(saved: bool) -> None:
    """Statistics move, gradients flow; also of a trace that was saved and loaded."""
    net = convert_sync_batchnorm(model())
    state = copy.deepcopy(net.state_dict())
    traced = torch.jit.trace(net, (images(),), check_trace=False)
    if saved:
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traced = torch.jit.load(file)
    traced.load_state_dict(state)  # tracing has run it once
    assert_trains_as_nn(traced)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_trace_checks_lengths(name: str) -> None:
    """It wrote past the buffer."""
    layer = SyncBatchNorm(3, process_group=SingleProcess())
    setattr(layer, name, (nn.Parameter if name in ("weight", "bias") else nn.Buffer)(torch.ones(2)))
    with pytest.raises((RuntimeError, ValueError), match=rf"expected {name} of shape \(3,\)"):
        torch.jit.trace(layer, (torch.randn(4, 3),), check_trace=False)


# torch.export


def test_export_in_training_is_that_of_nn_batch_norm() -> None:
    """What recognises batch norm in exported graphs (quantisation-aware training by PT2E) finds it."""
    programs = [torch.export.export(net.train(), (images(),)) for net in (convert_sync_batchnorm(model()), model())]
    ours, theirs = ([str(node.target) for node in p.graph.nodes if node.op == "call_function"] for p in programs)
    assert ours == theirs
    assert any("batch_norm" in target for target in ours)


@pytest.mark.filterwarnings("ignore")  # torch's own: of training mode, of what it uses itself
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export_in_training_is_that_of_nn_batch_norm(dynamo: bool, tmp_path) -> None:
    file, training = tmp_path / "model.onnx", torch.onnx.TrainingMode.TRAINING
    options = {"optimize": False} if dynamo else {"training": training}
    graphs = []
    for net in (convert_sync_batchnorm(model()), model()):
        torch.onnx.export(net.train(), (images(),), file, dynamo=dynamo, verbose=False, **options)
        graphs.append([(node.op_type, str(node.attribute)) for node in onnx.load(file).graph.node])
    assert graphs[0] == graphs[1]
    assert "BatchNormalization" in {kind for kind, _ in graphs[0]}


def test_export_in_training_with_peers_is_refused() -> None:
    net = convert_sync_batchnorm(model(), process_group=Unreachable()).train()
    with pytest.raises(ConversionError, match=r"an exported program has no replicas.*export syncbn.reverted\(model\)"):
        torch.export.export(net, (images(),))


# Fake tensors and modes


class Watching(TorchDispatchMode):
    """Counts the operations, as profilers and selective checkpointing do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_fake_tensors_give_shapes_and_issue_no_collective() -> None:
    net = convert_sync_batchnorm(model(), process_group=Unreachable())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(images()).requires_grad_()
        y = net(x)
        y.sum().backward()
    assert y.shape == (2, 3, 4, 4)
    assert x.grad.shape == x.shape


def test_a_dispatch_mode_sees_the_layer_as_an_operation() -> None:
    net = convert_sync_batchnorm(model())
    with Watching() as mode:
        assert_trains_as_nn(net)
    seen = [name for name in mode.seen if "syncbn" in name]
    assert seen == ["syncbn::forward", "syncbn::counted", "syncbn::backward"]


def test_a_mode_does_not_cost_the_second_derivative() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for layer in (nn.BatchNorm1d(3), SyncBatchNorm(3)):
        with Watching():
            (dx,) = torch.autograd.grad(layer.double()(x).tanh().sum(), x, create_graph=True)
            gradients += torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(*gradients)
