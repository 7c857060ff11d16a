# Sourced by the scripts beside it: messages, the Python environment, and the launchers.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The project's environment, as launch/setup.sh makes it; a relative path is one from the repository root.
environment=${SYNCBN_VENV:-.venv-syncbn}
[[ $environment == /* ]] || environment=$root/$environment

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# The comment at the head of a script is its help.
print_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

usage_error() {
  say "error: $* (see $0 --help)"
  exit 2
}

# The path of a program, or an error with the remedy:  tool NAME REMEDY ...
tool() { command -v "$1" || die "$1 not found: ${*:2}"; }

# The project's own environment comes before whatever other is active.
use_environment() {
  if [[ -x $environment/bin/python ]]; then
    export VIRTUAL_ENV=$environment PATH=$environment/bin:$PATH
  fi
}

# Becomes a launcher. By the folder, which is `syncbn launch` without the seconds that importing torch takes.
launch() { # torchrun | mpirun | ... ARGUMENT ...
  local python
  use_environment
  python=$(tool python3 "the active environment has no Python: run launch/setup.sh")
  exec "$python" "$root/syncbn/cluster" "$@"
}
