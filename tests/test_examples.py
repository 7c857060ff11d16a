"""The short examples, by the commands that they show: one process and two compute the same losses."""

from __future__ import annotations

import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_job

EXAMPLES = ("ddp", "mpi", "horovod")
BOUND = 1e-9  # relative, of the last loss after 135 steps in float64

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(300)]


def commands(script: str) -> tuple[list[str], list[str]]:
    """Return the two commands at the head of an example: alone, and by its launcher."""
    alone, launched = (
        shlex.split(line) for line in (ROOT / script).read_text().splitlines()[:10] if line.endswith(" " + script)
    )
    return alone, launched


def output_of(command: list[str], script: str, *options: str) -> str:
    """Run it with the job that runs the script in float64 in the script's place."""
    head = [sys.executable, "-m", "syncbn"] if command[0] == "syncbn" else command[:1]
    job = run_job([*head, *command[1:-1], "tests/jobs/example_job.py", *options, script], seconds=140)
    assert job.returncode == 0, job.stdout
    return job.stdout


def last_losses(output: str) -> list[float]:
    """Of every process."""
    return [float(text) for text in re.findall(r"last loss (\S+)", output)]


@cache
def alone(script: str) -> str:
    return output_of(commands(script)[0], script)


@pytest.fixture(params=EXAMPLES)
def script(request: pytest.FixtureRequest) -> str:
    if request.param == "horovod":
        pytest.importorskip("horovod", reason="needs Horovod: syncbn install-horovod")
    return f"examples/train_{request.param}.py"


def test_an_example_learns(script: str) -> None:
    assert float(re.findall(r"accuracy (\S+)", alone(script))[-1]) > 0.9


def test_two_processes_train_like_one_with_the_whole_batch(script: str) -> None:
    (reference,) = last_losses(alone(script))
    losses = last_losses(output_of(commands(script)[1], script))
    assert len(losses) == 2
    assert losses == pytest.approx([reference] * 2, rel=BOUND, abs=0)


def test_two_processes_with_local_statistics_do_not() -> None:
    """Negative control."""
    script = "examples/train_ddp.py"
    (reference,) = last_losses(alone(script))
    losses = last_losses(output_of(commands(script)[1], script, "local"))
    assert len(losses) == 2
    assert losses != pytest.approx([reference] * 2, rel=1e-3, abs=0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    assert len((ROOT / f"examples/train_{name}.py").read_text().splitlines()) < 80


def test_the_tour_draws_its_pictures(tmp_path: Path) -> None:
    """With one epoch and two numbers of replicas."""
    tour = (ROOT / "examples/tour.py").read_text()
    for long, short in (("EPOCHS, BATCH = 2, 32", "EPOCHS, BATCH = 1, 32"), ("[32, 16, 8, 4, 2, 1]  #", "[32, 8]  #")):
        assert tour.count(long) == 1
        tour = tour.replace(long, short)
    (tmp_path / "tour.py").write_text(tour)
    job = run_job([sys.executable, "tour.py"], seconds=140, cwd=tmp_path, env={"MPLBACKEND": "agg"})
    assert job.returncode == 0, job.stdout
    pictures = {picture.name for picture in (tmp_path / "runs/tour").iterdir()}
    assert pictures == {picture.name for picture in (ROOT / "docs/images/tour").iterdir()}
    errors = {
        name: [float(error) for error in row.split(", ")]
        for name, row in re.findall(r"^(.*, (?:with syncbn|nn\.BatchNorm2d)): (.*e-.*)$", job.stdout, re.MULTILINE)
    }
    assert len(errors) == 8
    for name, row in errors.items():
        assert all(error < 1e-13 if name.endswith("with syncbn") else error > 1e-5 for error in row), (name, row)
