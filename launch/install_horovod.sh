#!/usr/bin/env bash
# Usage: launch/install_horovod.sh
#
# Builds the pinned release of Horovod against the installed PyTorch, into the active virtual environment or, if none is
# active, the project's. It is built with its Gloo controller, for PyTorch only, and with one line changed: see
# below. Takes about five minutes on two cores and needs a C++ compiler and make, or seconds if the wheel of an earlier
# build is in ~/.cache/syncbn. Does nothing if that build is there already.
set -euo pipefail
source "$(dirname "$0")/common.sh"

case ${1-} in
  '') ;;
  -h | --help) print_help && exit ;;
  *) usage_error "unknown option $1" ;;
esac

[[ -n ${VIRTUAL_ENV-} ]] || use_environment
[[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} ]] || die "no active virtual environment and no $environment: run launch/setup.sh"
python=$(tool python3 "the active environment has no Python")

torch_version=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) ||
  die "$python has no PyTorch to build against: run launch/setup.sh, or pip install torch"

# The mark of our change, in the package's metadata. horovod.__version__ and the pin in constraints.txt go without.
mark=syncbn
version=$(sed -n 's/^horovod==//p' "$root/constraints.txt")+$mark

# The build records the version of torch it was made with; another torch has other symbols.
check_build() {
  "$python" - "$torch_version" "$version" <<'END'
import sys
from importlib.metadata import version
assert version("horovod") == sys.argv[2], f"another build, {version('horovod')}"
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

pip() { "$python" -m pip "$1" --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "${@:2}"; }

# A wheel's name tells versions of Python and machines apart, but not versions of torch.
python_tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/syncbn/torch-$torch_version
find_wheel() { compgen -G "$cache/horovod-$version-$python_tag-*_$(uname -m).whl"; }

build() {
  local cxx extension standard
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

  say "building Horovod $version for torch $torch_version in C++$standard with $cxx (five minutes)"
  # The build runs in this environment, where torch is, so its tools have to be there too.
  pip install setuptools wheel packaging cffi cmake
  pip download --no-deps --no-binary horovod --no-build-isolation --dest "$work" horovod
  mkdir "$work/source"
  tar -xf "$work"/horovod-*.tar.gz -C "$work/source" --strip-components=1
  change "$work/source/horovod/common/gloo/gloo_context.cc"

  export CXX=$work/c++ HOROVOD_CMAKE=${python%/*}/cmake MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
  export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_LOCAL_VERSION=$mark
  pip wheel --no-deps --no-build-isolation --wheel-dir "$cache" "$work/source"
}

# Horovod 0.28.1, gloo_context.cc:282: the context of a process set takes the network interface from its own member,
# which nobody has set, instead of the global context's. It then goes by the address of the host's own name, which
# crashes the rank where that is unknown or another host's, and keeps hosts apart where it is 127.0.1.1, as in Debian.
change() { # FILE
  sed -i '/::InitializeForProcessSet(/,/^}/s/iface = gloo_iface_;/iface = global_context.gloo_iface_;/' "$1"
  [[ $(grep -c 'iface = global_context\.gloo_iface_;' "$1") == 1 ]] ||
    die "expected 'iface = gloo_iface_;' once in InitializeForProcessSet of $1: the change is for another Horovod"
}

if ! find_wheel >/dev/null; then # not `|| build`: errors would go by
  build
fi
wheel=$(find_wheel) || die "expected a wheel of Horovod $version for $python_tag in $cache, which has: $(ls "$cache")"
pip install --force-reinstall --no-deps "$wheel"
pip install horovod # now what it needs to run

check_build || die "the build does not work: remove $cache and try again"
"$python" -m horovod.runner.launch --check-build
