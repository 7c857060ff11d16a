"""`syncbn install-horovod`: Horovod's last release, built against the installed torch.

It needs no package but torch, nothing of syncbn: the Docker images and launch/install_horovod.sh run this file alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

HOROVOD = "0.28.1"  # of June 2023
MARK = "syncbn"  # that it is our build, in the package's metadata; horovod.__version__ goes without it
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "cffi", "cmake<4")  # cmake 4 refuses Horovod's CMake files
DESCRIPTION = f"""Build Horovod {HOROVOD} against the installed torch, into the environment of this Python. Takes about
five minutes on two cores and needs a C++ compiler and make, or seconds if the wheel of an earlier build is in
~/.cache/syncbn. Does nothing if that build is there already.

It is built with its Gloo controller, for PyTorch only. A plain `pip install horovod` does not build: its CMake files
ask for C++14, torch's headers for more. One line is changed, without which groups crash where a host's own name does
not stand for its address."""

# Run by itself, as a build for another torch may crash. The build records the version of torch it was made with.
CHECK = f"""
import torch, horovod.torch as hvd
from importlib.metadata import version
from horovod.common.util import check_installed_version
assert version("horovod") == "{HOROVOD}+{MARK}", f"another build, {{version('horovod')}}"
check_installed_version("pytorch", torch.__version__, ImportError("built against another PyTorch"))
assert hvd.gloo_built(), "built without Gloo"
"""


def add_command(commands: Any) -> None:
    """Add `install-horovod` to the command line."""
    summary = f"build Horovod {HOROVOD}, which a plain pip install no longer does"
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("install-horovod", help=summary, description=DESCRIPTION, formatter_class=raw)
    parser.set_defaults(run=lambda arguments: install())


def install() -> None:
    """Build and install it. Ends the process with status 1, and says why, where that cannot be done."""
    torch_version = _torch_version()
    if find_spec("pip") is None:
        _fail(f"{sys.executable} has no pip: {sys.executable} -m ensurepip, or uv pip install pip")
    if _works():
        _say(f"Horovod for torch {torch_version} is there already")
        return
    # A wheel's name tells versions of Python and machines apart, but not versions of torch.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "syncbn", f"torch-{torch_version}")
    wheel = _wheel(cache)
    if wheel is None:
        with tempfile.TemporaryDirectory() as folder:
            _build(torch_version, Path(folder), cache)
        wheel = _wheel(cache)
    if wheel is None:
        _fail(f"pip left no wheel of Horovod {HOROVOD}+{MARK} for this Python in {cache}")
    _pip("install", "--force-reinstall", "--no-deps", str(wheel))
    _pip("install", f"horovod=={HOROVOD}")  # now what it needs to run
    if not _works():
        subprocess.run([sys.executable, "-c", CHECK], check=False)
        _fail(f"the build does not work, see above: remove {cache} and try again")
    subprocess.run([sys.executable, "-m", "horovod.runner.launch", "--check-build"], check=False)


def _say(text: str) -> None:
    print(f"syncbn install-horovod: {text}", file=sys.stderr, flush=True)


def _fail(text: str) -> NoReturn:
    _say(f"error: {text}")
    sys.exit(1)


def _torch_version() -> str:
    try:
        import torch
    except ImportError as error:
        _fail(f"{sys.executable} has no PyTorch to build against ({error}): pip install torch")
    return str(torch.__version__)


def _works() -> bool:
    return subprocess.run([sys.executable, "-c", CHECK], capture_output=True, check=False).returncode == 0


def _wheel(cache: Path) -> Path | None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return next(cache.glob(f"horovod-{HOROVOD}+{MARK}-{python}-*_{platform.machine()}.whl"), None)


def _build(torch_version: str, work: Path, cache: Path) -> None:
    """Leave a wheel in `cache`; `work` is an empty folder."""
    compiler, standard = _compiler(work)
    _say(f"building Horovod {HOROVOD} for torch {torch_version} in C++{standard} (five minutes)")
    # The build runs in this environment, where torch is, so its tools have to be there too.
    _pip("install", *BUILD_TOOLS)
    # Without these two options pip would fetch another torch.
    source = ("--no-deps", "--no-binary", "horovod", "--no-build-isolation", f"horovod=={HOROVOD}")
    _pip("download", *source, "--dest", str(work))
    shutil.unpack_archive(next(work.glob("horovod-*.tar.gz")), work / "source")
    folder = next((work / "source").iterdir())
    _change(folder / "horovod/common/gloo/gloo_context.cc")
    settings = {
        "CXX": str(compiler),
        "HOROVOD_CMAKE": str(Path(sysconfig.get_path("scripts"), "cmake")),
        "MAKEFLAGS": os.environ.get("MAKEFLAGS") or f"-j{len(os.sched_getaffinity(0))}",
        "HOROVOD_WITH_PYTORCH": "1", "HOROVOD_WITHOUT_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITHOUT_MPI": "1", "HOROVOD_LOCAL_VERSION": MARK,
    }  # fmt: skip
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(cache), str(folder), **settings)


def _compiler(work: Path) -> tuple[Path, str]:
    """Return a compiler in the C++ standard that torch's headers need, and that standard.

    cpp_extension.py holds the standard that torch compiles its own extensions with; the #error in ATen.h is only a
    lower bound. The last -std= on the command line holds, so the compiler is a wrapper that adds it behind all that
    CMake writes.
    """
    import torch.utils

    extension = Path(torch.utils.__path__[0], "cpp_extension.py")
    standards = re.findall(r"std=c\+\+(\d+)", extension.read_text())
    if not standards:
        _fail(f"{extension} names no C++ standard: Horovod was built last for torch 2.13, install that")
    standard = max(standards, key=int)
    program = shutil.which(os.environ.get("CXX") or "g++")
    if program is None or shutil.which("make") is None:
        _fail("no C++ compiler, or no make: on Debian and Ubuntu apt install g++ make, or set CXX to a C++ compiler")
    wrapper, empty = work / "c++", work / "empty.cc"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(program)} "$@" -std=gnu++{standard}\n')
    wrapper.chmod(0o755)
    empty.write_text("int main() {}\n")
    if subprocess.run([wrapper, "-fsyntax-only", empty], check=False).returncode != 0:
        _fail(f"{program} does not know C++{standard}: install a newer compiler, or set CXX to one")
    return wrapper, standard


def _change(file: Path) -> None:
    """Have the context of a process set take the network interface of the global one (gloo_context.cc:282).

    It takes it from its own member, which nobody has set. It then goes by the address of the host's own name, which
    crashes the rank where that is unknown or another host's, and keeps hosts apart where it is 127.0.1.1, as in Debian.
    """
    before, method, after = file.read_text().partition("::InitializeForProcessSet(")
    changed, count = re.subn(r"iface = gloo_iface_;", "iface = global_context.gloo_iface_;", after)
    if count != 1:
        _fail(f"expected 'iface = gloo_iface_;' once in InitializeForProcessSet of {file.name}, not {count} times: the "
              "change is for another Horovod")  # fmt: skip
    file.write_text(before + method + changed)


def _pip(command: str, *arguments: str, **settings: str) -> None:
    words = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(words, env={**os.environ, **settings}, check=False).returncode != 0:
        _fail(f"pip {command} failed, see above")


if __name__ == "__main__":
    argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    install()
