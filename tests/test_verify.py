"""`syncbn verify` passes what is right, and fails what is not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.cli import _model, _verify, main
from syncbn.cli._comparison import Row, error_of, over_ranks
from syncbn.cli._model import verify_model
from syncbn.cli._verify import verify_layer
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import InputError


def failed(rows: list[Row]) -> set[str]:
    return {row.quantity for row in rows if not row.passed}


# Rows


def test_a_row_passes_within_its_bound() -> None:
    assert Row("a", "y", 1.0, 1.0).passed
    assert not Row("a", "y", 1.1, 1.0).passed
    assert not Row("a", "y", math.nan, 1.0).passed
    assert Row("a", "y", 1.1, 1.0, control=True).passed
    assert not Row("a", "y", 1.0, 1.0, control=True).passed
    assert not Row("a", "y", math.nan, 1.0, control=True).passed


def test_the_largest_error_of_all_ranks_counts() -> None:
    errors = [[1.0, 0.0, math.nan], [2.0, 3.0, 0.0]]

    def replica(comm):
        return [row.error for row in over_ranks([Row("a", "y", error, 1) for error in errors[comm.rank]], comm)]

    for worst in run_threads(2, replica):
        assert worst[:2] == [2.0, 3.0]
        assert math.isnan(worst[2])


def test_errors_are_relative_to_the_largest_value() -> None:
    assert error_of(torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0])) == 0.01
    assert error_of(torch.tensor([0.01]), torch.tensor([0.02])) == pytest.approx(0.01)
    assert error_of(torch.empty(0), torch.empty(0)) == 0
    assert error_of(torch.ones(2), torch.ones(1)) == math.inf
    assert math.isnan(error_of(torch.tensor([math.nan]), torch.ones(1)))


# The layer


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_layer_passes(size: int) -> None:
    by_rank = run_threads(size, lambda comm: verify_layer(comm, "cpu"))
    assert all(rows == by_rank[0] for rows in by_rank)
    assert not failed(by_rank[0])
    assert any(row.control for row in by_rank[0]) == (size > 1)


class Wrong:
    """A communicator for the layer alone: the comparison keeps the right one."""

    def __init__(self, comm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size


class Averages(Wrong):
    """Of counts, too: the right mean and variance, and so the right dx."""

    def all_reduce(self, x):
        return self.comm.all_reduce(x) / self.size


class DeafInBackward(Wrong):
    """An odd length is 2C+1, the forward."""

    def all_reduce(self, x):
        return self.comm.all_reduce(x) if x.numel() % 2 else x


class WrongOnRank1(Wrong):
    """The sum of the first channel, on one rank."""

    def all_reduce(self, x):
        total = self.comm.all_reduce(x)
        total[0] += 1e-5 * self.rank
        return total


@pytest.mark.parametrize(
    ("wrong", "quantities"),
    [
        (lambda comm: SingleProcess(), {"y", "dx", "dweight", "running_mean", "running_var"}),
        (Averages, {"running_var"}),
        (DeafInBackward, {"dx"}),
        (WrongOnRank1, {"y", "dx", "running_mean"}),
    ],
)
def test_a_wrong_layer_fails(monkeypatch: pytest.MonkeyPatch, wrong, quantities: set[str]) -> None:
    def layer(*args, process_group, **options):
        return SyncBatchNorm(*args, process_group=wrong(process_group), **options)

    monkeypatch.setattr(_verify, "SyncBatchNorm", layer)
    for rows in run_threads(2, lambda comm: verify_layer(comm, "cpu")):
        assert failed(rows) >= quantities


def test_a_blind_comparison_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ranks have the same batch, a local layer is right as well."""
    drawn = _verify._data

    def alike(case, size):
        xs, gs, weight, bias = drawn(case, size)
        return [xs[0]] * size, [gs[0]] * size, weight, bias

    monkeypatch.setattr(_verify, "_data", alike)
    (rows, _) = run_threads(2, lambda comm: verify_layer(comm, "cpu"))
    assert [row.case for row in rows if not row.passed] == ["control: nn.BatchNorm2d"]


class Doubled(SyncBatchNorm):
    """Half a unit off in y, beyond every bound."""

    def forward(self, input):
        return super().forward(input) * 1.5


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_the_exit_status(monkeypatch, capfd, form: list[str]) -> None:
    main(["verify", *form])
    said = capfd.readouterr().out
    assert json.loads(said)["passed"] if form else said.rstrip().endswith("passed")
    monkeypatch.setattr(_verify, "SyncBatchNorm", Doubled)
    with pytest.raises(SystemExit) as ended:
        main(["verify", *form])
    assert ended.value.code == 1
    said = capfd.readouterr().out
    if form:
        assert not json.loads(said)["passed"]
    else:
        assert "float64 contiguous equal: error of y is" in said
        assert said.rstrip().endswith("FAILED")


# A model

MODELS = """
import torch
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )

class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(10, 6), nn.BatchNorm1d(6)

    def forward(self, numbers, x):
        h = self.norm(self.embedding(numbers) + x)
        return {"h": h, "more": (2 * h, "text", numbers)}

class Norm(nn.Module):
    def __init__(self, after=lambda y: y, before=lambda x: x):
        super().__init__()
        self.norm, self.after, self.before = nn.BatchNorm1d(6), after, before

    def forward(self, x):
        return self.after(self.norm(self.before(x)))

def random(): return Norm(before=nn.functional.dropout)
def scalar(): return Norm(after=torch.mean)
def constant(): return Norm(after=torch.Tensor.detach)
def rounded(): return Norm(after=torch.Tensor.float)
def without(): return nn.Linear(6, 6)
def evaluating(): return small().eval()
def nothing(): return None
"""
INPUTS = "\ndef example_inputs(n): return torch.randint(0, 10, (n,)), torch.randn(n, 6)\n"


@pytest.fixture
def models(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of models."""
    name = f"models_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    (tmp_path / f"{name}_with_inputs.py").write_text(MODELS + INPUTS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_model_passes(models: str, size: int) -> None:
    by_rank = run_threads(size, lambda comm: verify_model(f"{models}:small", (3, 7, 7), comm, "cpu"))
    assert all(rows == by_rank[0] for rows in by_rank)
    assert not failed(by_rank[0])
    kinds = ["outputs", "input gradients", "parameter gradients", "buffers"]
    assert [row.case for row in by_rank[0]] == kinds + ["control: not converted"] * (size > 1)


def test_a_model_with_inputs_of_its_own(models: str) -> None:
    (rows, _) = run_threads(2, lambda comm: verify_model(f"{models}_with_inputs:Nested", None, comm, "cpu"))
    assert not failed(rows)


@pytest.mark.parametrize("wrong", [lambda comm: SingleProcess(), Averages, DeafInBackward, WrongOnRank1])
def test_a_wrong_model_fails(models: str, monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    right = _model.convert_sync_batchnorm
    monkeypatch.setattr(_model, "convert_sync_batchnorm", lambda model, comm: right(model, wrong(comm)))
    (rows, _) = run_threads(2, lambda comm: verify_model(f"{models}:small", (3, 7, 7), comm, "cpu"))
    assert failed(rows)


def test_a_wrong_parameter_gradient_fails(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _model.convert_sync_batchnorm

    def convert(model: nn.Module, comm):
        model[4].weight.register_hook(lambda g: g * 1.001)
        return right(model, comm)

    monkeypatch.setattr(_model, "convert_sync_batchnorm", convert)
    (rows, _) = run_threads(2, lambda comm: verify_model(f"{models}:small", (3, 7, 7), comm, "cpu"))
    assert failed(rows) == {"4.weight"}


@pytest.mark.parametrize(
    ("spec", "sample", "words"),
    [
        ("{}:random", (6,), "random in training"),
        ("{}:scalar", (6,), r"shape \(\) for 2 samples"),
        ("{}:constant", (6,), "requires grad"),
        ("{}:without", (6,), "no BatchNorm layer in training mode"),
        ("{}:evaluating", (3, 7, 7), "no BatchNorm layer in training mode"),
        ("{}:nothing", (6,), "got NoneType"),
        ("{}:small", None, "no input"),
        ("{}:absent", (6,), "has no attribute 'absent'"),
        ("{}", (6,), "package.module:factory"),
        ("no_such_module:f", (6,), "No module named"),
    ],
)
def test_what_cannot_be_compared_is_refused(models: str, spec: str, sample, words: str) -> None:
    with pytest.raises(InputError, match=words):
        verify_model(spec.format(models), sample, SingleProcess(), "cpu")


def test_input_is_of_a_model() -> None:
    with pytest.raises(SystemExit, match="--model"):
        main(["verify", "--input", "3,8,8"])


@pytest.mark.parametrize("text", ["3x8", "", "3,", "-1"])
def test_an_input_that_is_no_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--model", "a:b", f"--input={text}"])
    assert "expected the sizes of one sample" in capsys.readouterr().err


# Under a launcher


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_job_passes(launch) -> None:
    job = launch(2, "-m", "syncbn", "verify")
    assert job.returncode == 0, job.stdout
    assert "SyncBatchNorm on 2 ranks" in job.stdout
    assert "control: nn.BatchNorm2d" in job.stdout
    assert job.stdout.rstrip().endswith("passed")


WRONG = """
import torch
from syncbn.cli import _verify, main
from syncbn.comm import SingleProcess

right = _verify.SyncBatchNorm
_verify.SyncBatchNorm = lambda *args, process_group, **options: right(*args, process_group=SingleProcess(), **options)
main(["verify"])
"""


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_job_with_a_wrong_layer_fails(launch, tmp_path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    job = launch(2, script)
    assert job.returncode != 0
    assert "float64 contiguous equal: error of y is" in job.stdout


@pytest.mark.launcher
@pytest.mark.timeout(90)
def test_a_model_in_a_job(launch, models: str, tmp_path) -> None:
    arguments = ["-m", "syncbn", "verify", "--model", f"{models}_with_inputs:Nested"]
    job = launch(2, *arguments, env={"PYTHONPATH": str(tmp_path)})
    assert job.returncode == 0, job.stdout
    assert "control: not converted" in job.stdout
