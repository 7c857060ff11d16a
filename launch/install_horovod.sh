#!/usr/bin/env bash
# Usage: launch/install_horovod.sh
#
# Builds the pinned release of Horovod against the installed PyTorch, into the active virtual environment or, if none is
# active, the project's .venv. It is built with its Gloo controller, for PyTorch only. Takes about five minutes on two
# cores and needs a C++ compiler and make. Does nothing if that build is there already.
set -euo pipefail
source "$(dirname "$0")/common.sh"

case ${1-} in
  '') ;;
  -h | --help) print_help && exit ;;
  *) usage_error "unknown option $1" ;;
esac

[[ -n ${VIRTUAL_ENV-} ]] || use_environment
[[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} ]] || die "no active virtual environment and no .venv: run launch/setup.sh"
python=$(tool python3 "the active environment has no Python")

torch_version=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) ||
  die "$python has no PyTorch to build against: run launch/setup.sh, or pip install torch"

# The build records the version of torch it was made with; another torch has other symbols.
check_build() {
  "$python" - "$torch_version" <<'END'
import sys
import horovod.torch as hvd
from horovod.common.util import check_installed_version
check_installed_version("pytorch", sys.argv[1], ImportError("built against another PyTorch"))
assert hvd.gloo_built(), "built without Gloo"
END
}

if check_build 2>/dev/null; then
  say "Horovod for torch $torch_version is there already"
  exit
fi

cxx=$(tool "${CXX:-g++}" "on Debian and Ubuntu apt install g++ make, or set CXX to a C++ compiler")
tool make "on Debian and Ubuntu apt install make" >/dev/null

# Horovod's CMake files ask for C++14, torch's headers for more. cpp_extension.py holds the standard that torch compiles
# its own extensions with; the #error in ATen.h is only a lower bound.
extension=$("$python" -c 'import torch.utils, os; print(os.path.join(torch.utils.__path__[0], "cpp_extension.py"))')
standard=$(grep -oE 'std=c\+\+[0-9]+' "$extension" | sort -V | tail -1 | tr -dc 0-9) ||
  die "$extension names no C++ standard: this PyTorch ($torch_version) is not known to work, install the pinned one"

# The last -std= on the command line holds, so a wrapper adds it behind all that CMake writes.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '#!/bin/sh\nexec %q "$@" -std=gnu++%s\n' "$cxx" "$standard" >"$work/c++"
chmod +x "$work/c++"
echo 'int main() {}' >"$work/empty.cc"
"$work/c++" -fsyntax-only "$work/empty.cc" || die "$cxx does not know C++$standard: install a newer compiler or set CXX"

# pip keeps the wheel it builds, but under a name without torch's version: a cache for each version keeps them apart.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/syncbn/torch-$torch_version
pip=("$python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt")

say "building Horovod for torch $torch_version in C++$standard with $cxx (five minutes, or seconds if pip has kept it)"
# The build runs in this environment, where torch is, so its tools have to be there too.
"${pip[@]}" setuptools wheel packaging cffi cmake
export CXX=$work/c++ HOROVOD_CMAKE=${python%/*}/cmake MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
"${pip[@]}" --force-reinstall --no-deps --no-build-isolation --cache-dir "$cache" horovod
"${pip[@]}" horovod # now what it needs to run

check_build || die "the build does not work: remove $cache and try again"
"$python" -m horovod.runner.launch --check-build
