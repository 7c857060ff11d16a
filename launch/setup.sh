#!/usr/bin/env bash
# Usage: launch/setup.sh [--dev | --integrations]
#
# Makes the virtual environment .venv-syncbn in the repository root, with the packages that constraints.txt pins and
# syncbn itself, editable, for the examples, torchrun and mpirun. (Horovod: launch/install_horovod.sh.) Does nothing if it
# is complete, and makes it anew if an installation was broken off. Touches no other environment, nor a folder of that
# name that it has not made itself.
#
# Options:
#   --dev            also what launch/test.sh needs
#   --integrations   instead, the packages of launch/integrations.txt, for launch/test-integrations.sh
#   --help           this text
#
# PYTHON names the Python to use (3.10 or newer); else the first good one of python3, python3.14, ... python3.10.
# SYNCBN_VENV names another folder for the environment; the launch scripts look there too.
set -euo pipefail
source "$(dirname "$0")/common.sh"

extras=examples,mpi pins=constraints.txt
case ${1-} in
  '') ;;
  --dev) extras=dev ;; # contains the other two
  --integrations) extras=integrations pins=launch/integrations.txt ;;
  -h | --help) print_help && exit ;;
  *) usage_error "unknown option $1" ;;
esac
cd "$root"
stamp=$environment/complete
ours=$environment/made-by-syncbn # without it, the folder is none of our business

usable_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local python candidates=(python3 python3.{14..10})
  [[ -z ${PYTHON-} ]] || candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    if usable_python "$python"; then
      command -v "$python"
      return
    fi
  done
  die "none of ${candidates[*]} is Python 3.10 or newer with venv:" \
    "on Debian and Ubuntu apt install python3-venv, or set PYTHON to the path of such a Python"
}

# An empty folder is as good as none.
if [[ -e $environment && ! -f $ours && ! (-d $environment && ! $(ls -A "$environment")) ]]; then
  die "$environment is there already and was not made by this script, which leaves it alone: rename or remove it, or" \
    "set SYNCBN_VENV to another folder. To use an environment of your own: activate it, and pip install ."
fi

# What a complete environment was made from; the path is part of it, as an environment cannot be moved.
key=$({ pwd && echo "${SYNCBN_BUILD_NATIVE-}" && cat pyproject.toml "$pins" csrc/*; } | sha256sum | cut -c1-64)
if [[ -f $stamp ]] && "$environment/bin/python" -c '' 2>/dev/null; then
  read -r old_key old_extras <"$stamp"
  if [[ $old_key == "$key" && ($old_extras == "$extras" || $old_extras == dev) ]]; then
    say "$environment is complete"
    exit
  fi
  [[ $old_extras != dev ]] || extras=dev # what was asked for once stays up to date
  say "updating $environment"
else
  # No stamp: an installation was broken off, and pip cannot tell what is whole.
  python=$(find_python)
  say "making $environment with $python ($("$python" --version))"
  mkdir -p "$environment"
  touch "$ours" # first, and kept: so that what is broken off from here on is known as ours
  find "$environment" -mindepth 1 -maxdepth 1 ! -path "$ours" -exec rm -rf {} +
  "$python" -m venv "$environment"
fi
rm -f "$stamp"

[[ ${SYNCBN_BUILD_NATIVE:-1} =~ ^(0|false|off|no)$ ]] || tool "${CXX:-c++}" "on Debian and Ubuntu apt install g++, set CXX to a C++ compiler," \
  "or set SYNCBN_BUILD_NATIVE=0 to do without the compiled kernels" >/dev/null

packages=(--editable ".[$extras]")
[[ $extras != integrations ]] || packages=(--requirement "$pins" --editable .)
say "installing syncbn[$extras] and the packages of $pins (a few minutes, most of it PyTorch)"
# These two reach the environment of the build as well. Paths are relative: pip splits the value at spaces.
export PIP_CONSTRAINT=$pins PIP_BUILD_CONSTRAINT=constraints.txt
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
echo "$key $extras" >"$stamp"
say "done: . $environment/bin/activate, or start jobs with launch/torchrun.sh and launch/mpirun.sh"
