# Sourced by the scripts beside it: messages, the Python environment, and the command line of the three launchers.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

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

# The project's own .venv comes before whatever environment is active.
use_environment() {
  if [[ -x $root/.venv/bin/python ]]; then
    export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
  fi
}

launcher_options() {
  cat <<'END'

Options:
  --procs-per-node N  processes to start on this host
  --dry-run           print the command and stop
  --help              this text
  -- SCRIPT ...       a Python script, or -m MODULE, and its arguments

Uses .venv in the repository root if it is there (launch/setup.sh makes it), else the active environment. Each process
gets OMP_NUM_THREADS = cores / N threads, unless that is set. A process that fails ends the whole job, and the exit
status is then not 0.
END
}

# Reads the command line of a launcher into `procs`, `dry_run` and the array `script`.
parse_job() {
  procs='' dry_run=''
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      -h | --help) print_help && launcher_options && exit ;;
      --dry-run) dry_run=yes ;;
      --procs-per-node=*) procs=${1#*=} ;;
      --procs-per-node) procs=${2-} && shift ;;
      *) usage_error "unknown option $1: the script and its arguments stand after --" ;;
    esac
    shift || break # --procs-per-node was the last word: the check of its value says so
  done
  [[ $procs =~ ^[1-9][0-9]*$ ]] || usage_error "expected --procs-per-node N with N of 1 or more, got '$procs'"
  script=("${@:2}")
  ((${#script[@]})) || usage_error "no script: expected -- SCRIPT [ARGUMENT ...] after the options"
  [[ ${script[0]} == -m || -f ${script[0]} ]] || die "no such script: '${script[0]}' (looked in $PWD)"
}

# Becomes the launcher, with the variables in the array `settings` added to the environment:  launch COMMAND ...
launch() {
  # Every process would else start a thread for each core, or, under torchrun, only one.
  local threads=$(($(nproc) / procs))
  settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}")
  local job=(env "${settings[@]}" "$@" "${script[@]}")
  if [[ $dry_run ]]; then
    printf '%q ' "${job[@]}" && echo
  else
    exec "${job[@]}"
  fi
}
