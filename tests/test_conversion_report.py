"""What a conversion says of each norm layer, before and after; what may be left out; other frameworks' layers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modules import snapshot
from reference import assert_tensor_close, on_rows, random_batch, randomized
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import ConversionReport, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.comm import run_threads
from syncbn.errors import ConversionError


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's and detectron2's."""


class Wrapper(nn.Module):
    """As torch-geometric's: skips its norm layer for a single node."""

    def __init__(self, *, allow_single_element: bool) -> None:
        super().__init__()
        self.allow_single_element = allow_single_element
        self.module = nn.BatchNorm1d(3)


def model() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    return nn.ModuleDict({"backbone": backbone, "head": nn.Sequential(nn.BatchNorm1d(3), SyncBatchNorm(3))})


ALL = ["backbone.1", "backbone.2.0", "head.0"]

SKIPS: dict[str, tuple[Any, list[str]]] = {
    "nothing": ((), ALL),
    "a path": ("head.0", ALL[:2]),
    "all inside": ("backbone", ALL[2:]),
    "a class": (nn.BatchNorm1d, ALL[:2]),
    "all in a class": (nn.ModuleDict, []),
    "several": (["backbone.2", nn.BatchNorm1d], ALL[:1]),
    "a predicate": (lambda path, module: path.endswith(".0") and isinstance(module, _BatchNorm), ALL[:1]),
    "no such class": (nn.BatchNorm3d, ALL),
}


@pytest.mark.parametrize(("skip", "expected"), SKIPS.values(), ids=SKIPS)
def test_what_is_skipped(skip: Any, expected: list[str]) -> None:
    net = model()
    before = snapshot(net)
    report = convert_sync_batchnorm(net, skip=skip, dry_run=True)
    assert snapshot(net) == before
    assert isinstance(report, ConversionReport)
    assert list(report.converted) == expected
    assert set(report.skipped) == {*ALL, "head.1"} - set(expected)
    assert convert_sync_batchnorm(net, skip=skip) is net
    assert [path for path, m in net.named_modules() if isinstance(m, SyncBatchNorm)] == [*expected, "head.1"]


def test_a_shared_layer_is_skipped_by_any_of_its_paths() -> None:
    norm = nn.BatchNorm1d(3)
    net = nn.ModuleDict({"a": norm, "b": norm})
    assert not convert_sync_batchnorm(net, skip="b", dry_run=True).converted


def test_a_layer_of_ours_that_is_skipped_keeps_its_group() -> None:
    net = convert_sync_batchnorm(model(), "node", skip="head")
    assert net["backbone"][1].process_group == "node"
    assert net["head"][1].process_group is None
    assert convert_sync_batchnorm(net, 2)["head"][1].process_group == 2


@pytest.mark.parametrize("skip", ["heads", 3, [None]], ids=str)
def test_a_skip_that_means_nothing(skip: Any) -> None:
    net = model()
    before = snapshot(net)
    with pytest.raises(ConversionError, match=r"skip=.*(is the path of no module|expected the path of a module)"):
        convert_sync_batchnorm(net, skip=skip)
    assert snapshot(net) == before


def test_what_is_left_and_why(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.ModuleDict(
        {
            "frozen": FrozenBatchNorm2d(),
            "single": Wrapper(allow_single_element=True),
            "every": Wrapper(allow_single_element=False),
            "instance": nn.InstanceNorm2d(3),
        }
    )
    with caplog.at_level(logging.INFO, "syncbn"):
        convert_sync_batchnorm(net)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert "norm layers: 2 converted, 0 skipped, 0 refused, 2 left" in text
    assert "left frozen: FrozenBatchNorm2d is no nn.BatchNorm*, and normalises by itself" in text
    assert "left single: Wrapper does not run its norm layer where it gets a single element" in text
    assert "converted every.module: BatchNorm1d" in text


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_is_left() -> None:
    report = convert_sync_batchnorm(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), dry_run=True)
    assert report.left == {"0": "BatchNorm2d was compiled by torch.jit.script: convert the model before that"}


@pytest.mark.parametrize(
    ("net", "level"), [(model, logging.INFO), (lambda: nn.Linear(1, 1), logging.WARNING)], ids=["some", "none"]
)
def test_it_is_logged_once(net: Any, level: int, caplog: pytest.LogCaptureFixture) -> None:
    net = net()
    with caplog.at_level(logging.INFO, "syncbn"):
        convert_sync_batchnorm(net, dry_run=True)
        assert not caplog.records
        convert_sync_batchnorm(net)
    assert [record.levelno for record in caplog.records] == [level]
    caplog.clear()
    convert_sync_batchnorm(net)
    assert all(record.levelno == level for record in caplog.records)


def _logged(rank: int, size: int) -> int:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("syncbn").addHandler(handler)
    try:
        convert_sync_batchnorm(nn.Linear(1, 1))
    finally:
        logging.getLogger("syncbn").removeHandler(handler)
    return len(records)


def test_it_is_logged_on_the_first_rank_alone(gloo) -> None:
    assert gloo(2, _logged) == [1, 0]


# Models that are wrapped already


def _within(rank: int, size: int, wrap: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), randomized(nn.BatchNorm1d(3))).double()
    whole = nn.Sequential(nn.Linear(3, 3), randomized(nn.BatchNorm1d(3))).double()
    whole.load_state_dict(net.state_dict())
    wrapped = DistributedDataParallel(net) if wrap == "DDP" else torch.compile(net, backend="aot_eager")
    batch = random_batch([(4, 3)] * size)
    if wrap == "compiled and run":
        wrapped(batch.xs[0])
        net.load_state_dict(whole.state_dict())
    convert_sync_batchnorm(wrapped)
    y = wrapped(batch.xs[rank])
    expected = whole(torch.cat(batch.xs))
    assert_tensor_close(y, expected[4 * rank : 4 * rank + 4])
    (y * batch.gs[rank]).sum().backward()
    (expected * torch.cat(batch.gs)).sum().backward()
    grad = net[1].weight.grad.clone()
    if wrap == "DDP":
        grad *= size
    else:
        dist.all_reduce(grad)
    assert_tensor_close(grad, whole[1].weight.grad, 10)
    assert_tensor_close(net[1].running_var, whole[1].running_var)


@pytest.mark.parametrize("wrap", ["DDP", "compiled", "compiled and run"])
def test_a_model_is_converted_within_its_wrapper(gloo, wrap: str) -> None:
    gloo(2, _within, wrap)


# Layers of other frameworks that synchronise by themselves. They are stand-ins with the interface of the originals, but
# for Horovod's: apex and detectron2 have no wheels.


def stand_in(module: str, name: str, base: type[nn.Module], **attributes: Any) -> nn.Module:
    def forward(self: Any, x: Any) -> Any:
        raise AssertionError("its own forward")

    layer = type(name, (base,), {"__module__": module, "forward": forward, "__doc__": None})(3)
    vars(layer).update(attributes)
    return layer


def horovods() -> nn.Module:
    return pytest.importorskip("horovod.torch.sync_batch_norm").SyncBatchNorm(3)


OTHERS = {
    "apex": lambda: stand_in(
        "apex.parallel.optimized_sync_batchnorm", "SyncBatchNorm", _BatchNorm, process_group="node", fuse_relu=False
    ),
    "detectron2": lambda: stand_in("detectron2.layers.batch_norm", "NaiveSyncBatchNorm", nn.BatchNorm2d),
    "mmcv": lambda: type("SyncBN", (nn.SyncBatchNorm,), {"_check_input_dim": lambda self, x: None})(3),
    "horovod": horovods,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_frameworks_layers(make: Any) -> None:
    before = snapshot(make())
    batch = random_batch([(2, 3, 4, 4)] * 2)
    expected = on_rows(nn.BatchNorm1d(3).double(), batch.xs)

    def replica(comm: Any) -> Any:
        return convert_sync_batchnorm(make().double(), comm)(batch.xs[comm.rank])

    for ours, theirs in zip(run_threads(2, replica), expected, strict=True):
        assert_tensor_close(ours, theirs)
    layer = make()
    before = snapshot(layer)
    convert_sync_batchnorm(layer)
    assert isinstance(layer, nn.BatchNorm2d)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert snapshot(revert_sync_batchnorm(layer)) == before


def test_a_layer_that_synchronises_keeps_its_group() -> None:
    layer = OTHERS["apex"]()
    assert convert_sync_batchnorm(layer).process_group == "node"


@pytest.mark.parametrize("option", ["fuse_relu", "channel_last"])
def test_apex_with_what_ours_has_not(option: str) -> None:
    layer = OTHERS["apex"]()
    setattr(layer, option, True)
    with pytest.raises(ConversionError, match=f"{option}=True"):
        convert_sync_batchnorm(layer)


# Reverted copies, and torch's own conversion


def test_a_reverted_copy() -> None:
    net = convert_sync_batchnorm(nn.Sequential(randomized(nn.BatchNorm2d(3)), nn.ReLU()))
    syncbn.fuse_activations(net)
    plain = syncbn.reverted(net)
    assert [type(m) for m in plain] == [nn.BatchNorm2d, nn.ReLU]
    assert isinstance(net[0], SyncBatchNorm)
    x = torch.randn(2, 3, 4, 4)
    assert_tensor_close(plain(x), net(x))
    assert plain[0].weight is not net[0].weight


def test_torchs_conversion_is_ours_until_it_is_undone() -> None:
    torchs = vars(nn.SyncBatchNorm)["convert_sync_batchnorm"]
    for undo in ("close", "__exit__"):
        replaced = syncbn.replace_torch_conversion()
        net = model()
        assert nn.SyncBatchNorm.convert_sync_batchnorm(net, "node") is net
        assert isinstance(net["backbone"][1], SyncBatchNorm)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules())
        assert net["head"][0].process_group == "node"
        getattr(replaced, undo)(*[None] * (3 * (undo == "__exit__")))
        assert vars(nn.SyncBatchNorm)["convert_sync_batchnorm"] is torchs


def test_torchs_conversion_is_ours_as_long_as_anybody_wants():
    watched = vars(nn.SyncBatchNorm)["convert_sync_batchnorm"]
    first, second = syncbn.replace_torch_conversion(), syncbn.replace_torch_conversion()
    first.close()
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3)), SyncBatchNorm)
    second.close()
    assert vars(nn.SyncBatchNorm)["convert_sync_batchnorm"] is watched


def test_torchs_conversion_says_what_it_replaces(caplog: pytest.LogCaptureFixture) -> None:
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))))
    assert [type(m) for m in (plain[0], plain[1][0])] == [nn.SyncBatchNorm] * 2
    assert not caplog.records
    net = nn.SyncBatchNorm.convert_sync_batchnorm(convert_sync_batchnorm(model()))
    assert type(net["head"][0]) is nn.SyncBatchNorm
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "torch's conversion replaces 4 layers of syncbn by nn.SyncBatchNorm: call" in record.getMessage()


def test_torchs_conversion_may_not_lose_an_activation() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), SyncBatchNorm(3, activation="relu"))
    before = snapshot(net)
    with pytest.raises(ConversionError, match=r"would replace 1, a layer of syncbn, and lose its activation relu"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert snapshot(net) == before


def test_a_subclass_of_torchs_layer_converts_as_before() -> None:
    kind = type("Sub", (nn.SyncBatchNorm,), {})
    assert type(kind.convert_sync_batchnorm(nn.BatchNorm2d(3))) is nn.SyncBatchNorm
