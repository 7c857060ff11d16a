"""`syncbn install-horovod`, without the five minutes: what it changes, and what it says where it cannot build."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.cli import _horovod_build, main

ROOT = Path(__file__).parents[1]
SOURCE = """
void GlooContext::Initialize(const std::string& gloo_iface) { attr.iface = gloo_iface_; }
void GlooContext::InitializeForProcessSet(const GlooContext& global_context) {
  attr.iface = gloo_iface_;
}
"""


def test_one_line_of_horovod_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "gloo_context.cc"
    file.write_text(SOURCE)
    _horovod_build._change(file)
    before, after = SOURCE.splitlines(), file.read_text().splitlines()
    assert [new for old, new in zip(before, after, strict=True) if old != new] == [
        "  attr.iface = global_context.gloo_iface_;"
    ]


def test_another_horovod_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gloo_context.cc"
    file.write_text(SOURCE + SOURCE)
    with pytest.raises(SystemExit):
        _horovod_build._change(file)
    assert "once in InitializeForProcessSet of gloo_context.cc, not 3 times" in capsys.readouterr().err
    assert file.read_text() == SOURCE + SOURCE


def test_the_compiler_uses_the_standard_of_torch(tmp_path: Path) -> None:
    compiler, standard = _horovod_build._compiler(tmp_path)
    command = [compiler, "-std=c++14", "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"#define __cplusplus { ({'17': '201703L', '20': '202002L'}[standard]) }\n" in macros


@pytest.mark.parametrize("absent", ["g++", "make"])
def test_no_compiler(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys, absent: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name in {"g++", "make"} - {absent}:
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        _horovod_build._compiler(tmp_path)
    assert ended.value.code == 1
    assert "apt install g++ make" in capsys.readouterr().err


def test_no_torch(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        main(["install-horovod"])
    assert re.search("has no PyTorch to build against .*: pip install torch", capsys.readouterr().err)


def test_no_pip(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(_horovod_build, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["install-horovod"])
    assert "-m ensurepip" in capsys.readouterr().err


def test_it_stands_alone() -> None:
    """Docker builds Horovod before syncbn is there; -I: nothing beside the file, nothing of this folder."""
    command = [sys.executable, "-I", str(ROOT / "syncbn/cli/_horovod_build.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50)
    assert "Build Horovod" in done.stdout
    assert "import syncbn" not in Path(_horovod_build.__file__).read_text()


def test_the_scripts_pin_the_same_release() -> None:
    assert f"horovod=={_horovod_build.HOROVOD}\n" in (ROOT / "constraints.txt").read_text()
