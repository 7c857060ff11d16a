"""`python -m syncbn bench`, without waiting for figures."""

from __future__ import annotations

import pytest
import torch

from syncbn.cli import _bench
from syncbn.comm import SingleProcess, run_threads


def test_every_bar_has_a_measured_ratio() -> None:
    layer = {"to_batch_norm": 0.1, "one_rank_to_batch_norm": 0.2, "to_floor": 0.3, "to_backend": None, "times": [1.0]}
    results = {
        "layer": [{"case": str(case), **layer} for case in _bench.CASES],
        "compiled": [{"to_eager": 0.4}, {"to_eager": None}],
        "resnet": {"sync_to_local": 0.5},
    }
    rows = _bench.bars(results)
    assert {row["bar"]: row["at_most"] for row in rows} == _bench.BARS
    by_name = {row["bar"]: row["measured"] for row in rows}
    assert by_name["small layer, one rank / nn.BatchNorm2d"] == 0.2
    assert by_name["large norm + ReLU, compiled / eager"] == 0.4
    assert by_name["small layer / one Gloo all-reduce"] is None  # no Gloo here


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
