#!/usr/bin/env bash
# Usage: launch/test-wheel.sh [--tests] WHEEL | --installed
#
# Tries a wheel as a user meets it: in a fresh environment, away from the repository, with the torch that constraints.txt
# pins. Imports it, runs `syncbn doctor` and a training of two ranks, by torchrun and by `syncbn launch torchrun`, and says
# how many seconds the first synchronised step came after `pip install`.
#
# Options:
#   --tests       also the quick tests, from a copy of tests/ (some minutes more)
#   --installed   instead, the syncbn of the active environment, for cibuildwheel
#   --help        this text
#
# PYTHON names the Python to try it with (the project's, else python3).
set -euo pipefail
source "$(dirname "$0")/common.sh"

tests=''
case ${1-} in
  -h | --help) print_help && exit ;;
  --tests) tests=yes && shift ;;
esac
(($# == 1)) || usage_error "expected one wheel, or --installed"
[[ ! $tests || $1 != --installed ]] || usage_error "--tests needs a wheel"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
export PIP_CONSTRAINT=$root/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 STARTED

check() {
  say "$*"
  "$@"
}

if [[ $1 != --installed ]]; then
  wheel=$(realpath -e "$1")
  python=$(use_environment && tool "${PYTHON:-python3}" "set PYTHON to a Python, 3.10 or newer") # its PATH ends here
  "$python" -m venv "$folder/venv"
  export VIRTUAL_ENV=$folder/venv PATH=$folder/venv/bin:$PATH
  STARTED=$(date +%s)
  check pip install --quiet "$wheel"
fi
cp "$root/tests/jobs/wheel_job.py" "$folder"
cd "$folder"
STARTED=${STARTED:-$(date +%s)}
check torchrun --nproc-per-node 2 wheel_job.py
check syncbn launch torchrun --procs-per-node 2 -- wheel_job.py
check syncbn doctor
if [[ $tests ]]; then
  check pip install --quiet "${wheel}[dev]"
  # All that the tests read; the package is what was installed.
  (cd "$root" && git ls-files -z -- ':!syncbn' | xargs -0 cp --parents -t "$folder")
  ln -s "$(python -c 'import syncbn; print(*syncbn.__path__)')" syncbn
  check python -m pytest -q -m "not launcher" tests
fi
say "passed"
