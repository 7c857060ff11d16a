"""What people do with a trained model: export, fold, quantise, average, save, take features from it."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from reference import Recording, assert_tensor_close, random_batch, randomized
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from vision import load

import syncbn
from syncbn import SyncBatchNorm, convert_sync_batchnorm, fuse_activations, revert_sync_batchnorm
from syncbn.comm import run_threads


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@functools.cache
def trained() -> nn.Module:
    """A ResNet that has been trained a little, with every norm layer away from its start."""
    torch.manual_seed(0)
    net = load("torchvision.models").resnet18(num_classes=4)
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            randomized(m)
    for _ in range(2):
        net(images(4))
    return net.eval()


def plain() -> nn.Module:
    return copy.deepcopy(trained())


def converted() -> nn.Module:
    return convert_sync_batchnorm(plain())


def fused() -> nn.Module:
    net = converted()
    assert len(fuse_activations(net)) == 17
    return net


def reverted(net: nn.Module) -> nn.Module:
    return revert_sync_batchnorm(copy.deepcopy(net))


BOTH = pytest.mark.parametrize("make", [converted, fused])


def norms(net: nn.Module) -> int:
    return sum(isinstance(m, _BatchNorm) for m in net.modules())


# Other runtimes


@BOTH
def test_torch_export_with_batches_of_any_size(make: Callable[[], nn.Module]) -> None:
    program = torch.export.export(make(), (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for count in (2, 5):
        assert_tensor_close(program(images(count)), plain()(images(count)))


@BOTH
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it uses itself
def test_onnxruntime_computes_what_the_model_does(make: Callable[[], nn.Module], tmp_path) -> None:
    torch.onnx.export(make(), (images(),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    assert_tensor_close(torch.from_numpy(y), plain()(images()), 10)


@BOTH
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_a_trace_saved_and_loaded_elsewhere(make: Callable[[], nn.Module], tmp_path) -> None:
    """In eval it holds torch's operations alone: a process without syncbn runs it."""
    torch.jit.save(torch.jit.trace(make(), images()), tmp_path / "net.pt")
    torch.save((images(), plain()(images())), tmp_path / "expected.pt")
    run_elsewhere(
        f"""
        net, (x, y) = torch.jit.load("{tmp_path}/net.pt"), torch.load("{tmp_path}/expected.pt")
        torch.testing.assert_close(net(x), y)
        assert "syncbn" not in sys.modules
        """
    )


def run_elsewhere(code: str) -> None:
    """Run `code` in another process, without a group."""
    lines = ["import sys, torch", *(line.strip() for line in code.strip().splitlines())]
    job = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert job.returncode == 0, job.stderr


# Folding, quantisation, features: by torch.fx


def test_folding_one_layer_into_its_convolution() -> None:
    """A layer with an activation of its own would lose it, as of any norm layer that is taken away: revert first."""
    net, theirs = converted(), plain()
    folded = fuse_conv_bn_eval(net.conv1, net.bn1)
    assert_tensor_close(folded(images()), theirs.bn1(theirs.conv1(images())), 10)


@BOTH
@pytest.mark.filterwarnings("ignore")  # torch's own, when it is imported
def test_folding_a_model(make: Callable[[], nn.Module]) -> None:
    """torch's fusion knows nn.BatchNorm2d alone, and takes a reverted copy; other norm layers it leaves as they are."""
    from torch.fx.experimental.optimization import fuse

    net = make()
    folded = fuse(reverted(net))
    assert norms(folded) == 0
    assert_tensor_close(folded(images()), plain()(images()), 100)
    left = fuse(net)
    assert norms(left) == norms(net)
    assert_tensor_close(left(images()), plain()(images()), 10)


@BOTH
@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_quantisation_by_fx_keeps_the_layer_and_folds_it_in_a_reverted_copy(make: Callable[[], nn.Module]) -> None:
    """As with nn.SyncBatchNorm, which is not quantised either."""
    net, x, y = make(), images(), plain()(images())
    for start, left in ((copy.deepcopy(net), norms(net)), (reverted(net), 0)):
        prepared = prepare_fx(start, get_default_qconfig_mapping(), (x,))
        assert norms(prepared) == left
        assert_tensor_close(prepared(x), y, 100)
        assert (convert_fx(prepared)(x) - y).abs().max() < 0.2 * y.abs().max()


@BOTH
@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_quantisation_aware_training_by_fx_is_synchronised(make: Callable[[], nn.Module]) -> None:
    net = make().train()
    recording = Recording(syncbn.world())
    convert_sync_batchnorm(net, recording)
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping(), (images(),))
    prepared(images()).sum().backward()
    assert len(recording.calls) == 2 * norms(net) == 40


@BOTH
def test_features(make: Callable[[], nn.Module]) -> None:
    """Under the names that nn.BatchNorm2d gives the nodes; and the extractor trains synchronised."""
    extraction = load("torchvision.models.feature_extraction")
    net = make()
    for name in ("bn1", "layer1.0.bn2", "layer2.0.downsample.1"):
        assert name in extraction.get_graph_node_names(net)[1]
    recording = Recording(syncbn.world())
    convert_sync_batchnorm(net, recording)
    expected = extraction.create_feature_extractor(plain(), ["layer1", "layer2.0.downsample.1"])(images())
    extractor = extraction.create_feature_extractor(net, list(expected))
    for name, value in extractor(images()).items():
        assert_tensor_close(value, expected[name], 10)
    extractor.train()(images())
    assert len(recording.calls) == 6  # the stem, the four of layer1 and the one that was asked for


@pytest.mark.parametrize("make", [lambda: SyncBatchNorm(3), lambda: convert_sync_batchnorm(nn.BatchNorm2d(3))])
def test_hooks_of_a_leaf_run_once(make: Callable[[], nn.Module]) -> None:
    """When the traced model runs, not when it is traced too."""
    net = nn.Sequential(make()).eval()
    net[0].register_forward_hook(lambda layer, args, y: y * 2)
    traced = torch.fx.symbolic_trace(net)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(traced(images()), net(images()))


# Files


@BOTH
def test_safetensors(make: Callable[[], nn.Module], tmp_path) -> None:
    """The tensors go both ways between the layer and nn.BatchNorm2d."""
    net = make()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "state.safetensors")
    safetensors.torch.save_model(net, str(tmp_path / "model.safetensors"))
    for other in (load("torchvision.models").resnet18(num_classes=4), fused()):
        for p in other.state_dict().values():
            p.zero_()
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
        assert_tensor_close(other.eval()(images()), plain()(images()), 10)
        assert safetensors.torch.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])


@BOTH
@pytest.mark.timeout(120)
@pytest.mark.parametrize("native", [True, False])
def test_a_saved_model_opens_without_group_or_compiled_kernels(
    make: Callable[[], nn.Module], native: bool, tmp_path
) -> None:
    """It needs syncbn; a reverted copy does not."""
    load("torchvision.models")
    net = make()
    torch.save(convert_sync_batchnorm(net, "node"), tmp_path / "net.pt")
    torch.save(reverted(net), tmp_path / "reverted.pt")
    torch.save((images(), plain()(images())), tmp_path / "expected.pt")
    without = "" if native else "sys.modules['syncbn._native'] = None"
    run_elsewhere(
        f"""
        sys.path.insert(0, "tests")
        from vision import load; load("torchvision.models")
        x, y = torch.load("{tmp_path}/expected.pt")
        torch.testing.assert_close(torch.load("{tmp_path}/reverted.pt", weights_only=False)(x), y)
        assert "syncbn" not in sys.modules
        {without}
        net = torch.load("{tmp_path}/net.pt", weights_only=False)
        torch.testing.assert_close(net(x), y)
        from syncbn._compiled import native
        assert (native is not None) == {native}
        assert net.bn1.process_group == "node"
        net.train()(x).sum().backward()
        """
    )


# Averages


def batches(rank: int) -> list[Tensor]:
    return [random_batch([(4, 3, 2, 2)] * 2, seed=seed).xs[rank] for seed in range(3)]


def small(group: Any = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    return convert_sync_batchnorm(net.double(), group) if group is not None else net.double()


def _update_bn(rank: int, size: int) -> None:
    net, whole = small("world").eval(), small()
    update_bn(batches(rank), net)
    assert net[1].momentum == 0.1
    assert not net.training
    update_bn([torch.cat(parts) for parts in zip(*map(batches, range(size)), strict=True)], whole)
    for ours, theirs in zip(net.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_update_bn_on_every_rank_is_that_of_all_batches(gloo) -> None:
    gloo(2, _update_bn)


def _update_bn_alone(rank: int, size: int) -> str:
    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank == 0:
        with pytest.raises(syncbn.errors.CollectiveError) as caught:
            update_bn(batches(0), small(group))
        net = revert_sync_batchnorm(small(group))  # with the statistics of its own batches
        update_bn(batches(0), net)
        assert net[1].num_batches_tracked == 3
        return str(caught.value)
    return ""


def test_update_bn_on_one_rank_alone_ends_at_the_deadline(gloo) -> None:
    message, _ = gloo(2, _update_bn_alone)
    assert "did not call in time" in message


AVERAGES = {
    "torch": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "timm": lambda net: load("timm.utils").ModelEmaV3(net, decay=0.5),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_an_exponential_average(average: Callable[[nn.Module], nn.Module]) -> None:
    """Parameters and statistics, of two replicas, as of one process with the whole batch."""

    def train(net: nn.Module, xs: list[Tensor]) -> list[Tensor]:
        mean = average(net)
        for x in xs:
            net(x)
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(1.1)
            getattr(mean, "update_parameters", getattr(mean, "update", None))(net)
        return [*mean.module.eval().state_dict().values(), mean.module(batches(0)[0])]

    nets = [small() for _ in range(2)]  # not in the threads: the seed is global
    ours = run_threads(2, lambda comm: train(convert_sync_batchnorm(nets[comm.rank], comm), batches(comm.rank)))
    theirs = train(small(), [torch.cat(parts) for parts in zip(batches(0), batches(1), strict=True)])
    for replica in ours:
        for value, expected in zip(replica, theirs, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
