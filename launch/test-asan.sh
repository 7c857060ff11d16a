#!/usr/bin/env bash
# Usage: launch/test-asan.sh [ARGUMENT ...]
#
# Runs the tests of the kernels and of the shared memory once over a build of the compiled module that checks addresses
# and undefined behaviour (-fsanitize=address,undefined). It is built in a temporary folder, beside the packages of the
# active virtual environment or, if none is active, the project's, which stay as they are. Needs g++ and its
# libasan; takes a few minutes. The arguments go to pytest: launch/test-asan.sh -k outside
#
# Options:
#   --help    this text
set -euo pipefail
source "$(dirname "$0")/common.sh"

case ${1-} in
  -h | --help) print_help && exit ;;
esac
[[ -n ${VIRTUAL_ENV-} ]] || use_environment
python=$(tool python "no active virtual environment and none of the project: run launch/setup.sh --dev")
compiler=$(tool g++ "on Debian and Ubuntu apt install g++")
asan=$("$compiler" -print-file-name=libasan.so)
[[ -f $asan ]] || die "g++ has no libasan: on Debian and Ubuntu apt install libasan8"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# An environment that has the packages of this one on its path: their .pth files, and so an editable syncbn, stay unread.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m venv --without-pip "$folder/venv"
sanitized=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$sanitized/packages.pth"

say "building with the sanitizers"
CXX=g++ PIP_BUILD_CONSTRAINT=$root/constraints.txt "$python" -m pip install --quiet --disable-pip-version-check \
  --no-deps --target "$sanitized" --config-settings=cmake.define.SYNCBN_SANITIZE=ON \
  --config-settings=install.strip=false "$root"

# Away from the sources, which would be imported in the place of the build.
cp -r "$root/tests" "$root/pyproject.toml" "$folder"
cd "$folder"
say "running the tests"
# What Python keeps to its end is no leak. libasan looks for C++'s `throw` as it starts, when Python has none yet. The
# sanitizers take several times as long: so may a test. What only rounding is judged by is left out.
env LD_PRELOAD="$asan $("$compiler" -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  venv/bin/python -m pytest -o timeout=300 --capture=sys -k "not composed and not twice" tests/test_kernels.py tests/test_shared_memory.py "$@"
say "passed: no wrong address, no undefined behaviour"
