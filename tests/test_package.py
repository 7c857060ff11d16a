"""What pyproject.toml says of the package, and what an installation says that is not whole."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import syncbn
from syncbn import _compiled, _torch_version
from syncbn.cli import _installation

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings() -> dict[str, Any]:
    toml = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return toml.loads((ROOT / "pyproject.toml").read_text())


def test_version(settings: dict[str, Any]) -> None:
    """In one place, from which the build reads it; the change log and the citation follow."""
    assert settings["tool"]["scikit-build"]["metadata"]["version"]["input"] == "syncbn/__init__.py"
    releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == syncbn.__version__
    assert f"\nversion: {syncbn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_commands_are_there(settings: dict[str, Any]) -> None:
    for target in settings["project"]["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_types_are_there(settings: dict[str, Any]) -> None:
    assert "Typing :: Typed" in settings["project"]["classifiers"]
    assert (Path(syncbn.__file__).parent / "py.typed").is_file()


def test_the_pythons_are_the_same_everywhere(settings: dict[str, Any]) -> None:
    classifiers = re.findall(r"Python :: 3\.(\d+)", " ".join(settings["project"]["classifiers"]))
    wheels = [name.removeprefix("cp3").removesuffix("-*") for name in settings["tool"]["cibuildwheel"]["build"]]
    assert classifiers == wheels
    assert settings["project"]["requires-python"] == f">=3.{classifiers[0]}"
    assert settings["tool"]["scikit-build"]["wheel"]["py-api"].removeprefix("cp3") in classifiers


def test_an_old_torch_is_refused(settings: dict[str, Any]) -> None:
    oldest = ".".join(map(str, _torch_version.OLDEST))
    assert f"torch>={oldest}" in settings["project"]["dependencies"]
    with pytest.raises(ImportError, match=rf"needs torch {oldest} .* 1\.13\.1\+cu117 .*pip install --upgrade torch"):
        _torch_version.refuse_older("1.13.1+cu117")
    _torch_version.refuse_older(f"{oldest}.0a0+git")
    imports = [line for line in Path(syncbn.__file__).read_text().splitlines() if line.startswith("from ")]
    assert imports[0] == "from . import _torch_version as _torch_version"  # before what needs a newer torch


def test_a_compiled_module_of_another_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_compiled, "__file__", str(tmp_path / "_compiled.py"))
    missing = ImportError("cannot import name '_native' from 'syncbn'", path=str(tmp_path / "__init__.py"))
    assert "without its compiled module" in _compiled._reason(missing)
    (tmp_path / "_native.cpython-39-x86_64-linux-gnu.so").touch()
    assert "for another Python: _native.cpython-39" in _compiled._reason(missing)


def test_a_compiled_module_that_does_not_load_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_native.abi3.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as raised:
        importlib.import_module("broken_native")
    assert re.search(r"does not load: .*broken_native\.abi3\.so", _compiled._reason(raised.value))


def test_doctor_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installation, "native", None)
    monkeypatch.setattr(_installation, "absence", "it was installed without")
    monkeypatch.setitem(sys.modules, "syncbn._native", None)
    kernels, memory = _installation._kernels(), _installation._shared_memory()
    assert (kernels.state, memory.state) == ("absent", "absent")
    assert "it was installed without" in kernels.what
    assert "pip install --force-reinstall" in kernels.remedy
