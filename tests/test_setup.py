"""launch/setup.sh: which folders it makes, repairs and leaves alone. A stand-in for Python takes no minutes."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Answers what setup.sh asks a Python for: is it usable, its version, `-m venv [--clear] FOLDER`, `-m pip ...`.
PYTHON = """#!/usr/bin/env bash
case "$1 ${2-}" in
  "-m venv")
    folder="${@: -1}"
    [[ $3 != --clear ]] || rm -rf "$folder"
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python" ;;
  "-m pip")
    echo "$PIP_CONSTRAINT: $*" >"${0%/bin/*}/pip-was-asked"
    exit "${PIP_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What setup.sh reads of the repository, and a .venv of the user's own beside it."""
    folder = tmp_path / "a repository"
    folder.mkdir()
    for name in ("launch", "csrc"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").mkdir()
    (folder / ".venv/precious").write_text("mine")
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return folder


def set_up(repository: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "SYNCBN_VENV"}
    env = {**inherited, "PYTHON": str(repository / "python"), "SYNCBN_BUILD_NATIVE": "0", **settings}
    command = ["bash", str(repository / "launch/setup.sh"), *arguments]
    return subprocess.run(command, check=False, env=env, text=True, capture_output=True, timeout=30)


def uses(repository: Path, **settings: str) -> str:
    """Return the environment that a launch script takes."""
    source = "source launch/common.sh && VIRTUAL_ENV=active && use_environment && echo $VIRTUAL_ENV"
    env = {"PATH": os.environ["PATH"], **settings}
    done = subprocess.run(["bash", "-c", source], check=True, cwd=repository, env=env, text=True, capture_output=True)
    return done.stdout.strip()


def test_an_environment_of_the_users_own_stays(repository: Path) -> None:
    assert uses(repository) == "active"
    done = set_up(repository)
    assert done.returncode == 0, done.stderr
    assert (repository / ".venv/precious").read_text() == "mine"
    assert sorted(path.name for path in (repository / ".venv").iterdir()) == ["precious"]
    assert uses(repository) == str(repository / ".venv-syncbn")
    again = set_up(repository)
    assert ".venv-syncbn is complete" in again.stderr
    assert again.returncode == 0


@pytest.mark.parametrize("name", ["elsewhere", "{}/abs olute"])
def test_another_folder_by_name(repository: Path, tmp_path: Path, name: str) -> None:
    name = name.format(tmp_path)
    assert set_up(repository, SYNCBN_VENV=name).returncode == 0
    assert not (repository / ".venv-syncbn").exists()
    assert (repository / name / "complete").is_file()  # an absolute name wins
    assert uses(repository, SYNCBN_VENV=name) == str(repository / name)


@pytest.mark.parametrize("settings", [{}, {"SYNCBN_VENV": ".venv"}, {"SYNCBN_VENV": "."}])
def test_a_folder_that_it_has_not_made_stays(repository: Path, settings: dict[str, str]) -> None:
    folder = repository / settings.get("SYNCBN_VENV", ".venv-syncbn")
    folder.mkdir(exist_ok=True)
    (folder / "complete").write_text("old-key examples,mpi\n")  # as if it were
    before = sorted(repository.rglob("*"))
    done = set_up(repository, **settings)
    assert done.returncode == 1
    assert f"{folder.resolve().name}" in done.stderr
    assert "SYNCBN_VENV to another folder" in done.stderr
    assert sorted(repository.rglob("*")) == before


def test_a_file_in_its_place_stays(repository: Path) -> None:
    (repository / ".venv-syncbn").write_text("mine")
    assert set_up(repository).returncode == 1
    assert (repository / ".venv-syncbn").read_text() == "mine"


def test_an_empty_folder_is_taken(repository: Path) -> None:
    (repository / ".venv-syncbn").mkdir()
    assert set_up(repository).returncode == 0
    assert (repository / ".venv-syncbn/complete").is_file()


def test_a_broken_off_installation_is_repaired(repository: Path) -> None:
    assert set_up(repository, PIP_STATUS="1").returncode != 0
    environment = repository / ".venv-syncbn"
    assert not (environment / "complete").exists()
    (environment / "lib").mkdir()
    (environment / "lib/half-a-package").write_text("")
    assert set_up(repository).returncode == 0
    assert not (environment / "lib").exists()
    assert (environment / "complete").is_file()


def test_an_update_keeps_what_is_there(repository: Path) -> None:
    assert set_up(repository).returncode == 0
    (repository / ".venv-syncbn/horovod").write_text("")
    (repository / "constraints.txt").write_text("")
    done = set_up(repository)
    assert "updating" in done.stderr
    assert (repository / ".venv-syncbn/horovod").exists()


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], "constraints.txt: *--editable .[[]examples,mpi[]]"),
        (["--dev"], "constraints.txt: *--editable .[[]dev[]]"),
        (["--integrations"], "launch/integrations.txt: *--requirement launch/integrations.txt --editable ."),
    ],
)
def test_what_is_installed(repository: Path, arguments: list[str], asked: str) -> None:
    assert set_up(repository, *arguments).returncode == 0
    assert fnmatch.fnmatch((repository / ".venv-syncbn/pip-was-asked").read_text().strip(), asked)
