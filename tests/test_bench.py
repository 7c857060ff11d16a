"""`syncbn bench`, without waiting for figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, fuse_activations
from syncbn.cli import _bench
from syncbn.cli._training import FusedBlock, small_resnet
from syncbn.comm import SingleProcess, run_threads


def test_every_bar_has_a_measured_ratio() -> None:
    bars = load("benchmarks/bars.py")
    layer = {"to_batch_norm": 0.1, "one_rank_to_batch_norm": 0.2, "to_floor": 0.3, "to_backend": None, "times": [1.0]}
    results = {
        "layer": [{"case": str(case), **layer} for case in _bench.CASES],
        "fused": [
            {"case": f"{case}{added}", "to_unfused": 0.6, "to_floor": 0.7}
            for case in _bench.CASES[:2]
            for added in ("", " with addition")
        ],
        "compiled": [{"to_eager": 0.4, "fused_to_eager": 0.8}, {"to_eager": None, "fused_to_eager": None}],
        "resnet": {"sync_to_local": 0.5, "fused_to_local": 0.4},
    }
    by_name = bars.measured(results)
    assert by_name.keys() == bars.BARS.keys()
    assert by_name["small layer, one rank / nn.BatchNorm2d"] == 0.2
    assert by_name["large norm + ReLU, compiled / eager"] == 0.4
    assert by_name["small layer / one Gloo all-reduce"] is None  # no Gloo here


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("module", Path(__file__).parents[1] / path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fused_in_all_variants() -> None:
    for added in (False, True):
        record = _bench.fused(_bench.Case((2, 4, 3, 3)), SingleProcess(), 2, added=added)
        assert {"syncbn", "one rank", "nn.BatchNorm2d + nn.ReLU", "collectives", "floor"} == record["seconds"].keys()
        assert record["to_unfused"] > 0


def test_the_networks_compute_the_same() -> None:
    torch.manual_seed(0)
    local = small_resnet(nn.BatchNorm2d).double()
    fused = small_resnet(SyncBatchNorm, FusedBlock).double()
    assert [fusion.activation for fusion in fuse_activations(fused)] == ["2"]  # of the stem
    fused.load_state_dict(local.state_dict())
    images = torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(fused(images), local(images))


def test_one_case_in_all_variants() -> None:
    record = _bench.layer(_bench.Case((2, 4, 3, 3)), SingleProcess(), 2)
    assert {"syncbn", "one rank", "nn.BatchNorm2d", "composed", "collectives", "floor"} == record["seconds"].keys()
    assert record["one_rank_to_batch_norm"] > 0


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_measure_in_step(size: int) -> None:
    """A rank that ran another order would sum other numbers."""

    def replica(comm):
        variants = {str(n): lambda n=n: comm.all_reduce(torch.zeros(n)) for n in range(1, 4)}
        return {name: len(seconds) for name, seconds in _bench.interleaved(variants, comm, 3).items()}

    assert run_threads(size, replica) == [{"1": 3, "2": 3, "3": 3}] * size


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    if _bench.device() == "cpu":
        assert _bench.compiled(_bench.Case(_bench.SMALL), SingleProcess(), 1)["to_eager"] is None
