# Sourced by the scripts beside it: messages, the Python environment, and the command line of the three launchers.
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

# The options that the launchers share follow each one's own in its help.
print_launcher_help() {
  print_help
  cat <<'END'
  --procs-per-node N  ranks to start on a host
  --interface NAME    network interface between the hosts; else the one that the route to the head node takes
  --timeout SECONDS   how long to wait for the other hosts (300)
  --preflight         first run `python -m syncbn doctor` as the same job, and start the script only if all is well
  --dry-run           print the command and stop; no process is started on any host
  --help              this text
  -- SCRIPT ...       a Python script, or -m MODULE, and its arguments

Uses .venv-syncbn in the repository root, or what SYNCBN_VENV names, if it is there (launch/setup.sh makes it), else the
active environment; it and the script have the same path on every host. Each rank gets OMP_NUM_THREADS = cores / ranks of
its host, unless that is set; and, on CPUs, MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=9223372036854775807, with which
it keeps the memory of freed tensors, unless you set malloc yourself (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 leaves it as
it is).
A rank that fails ends the whole job, and the exit status is then not 0.
END
}

# Reads a launcher's command line: the value of --some-option into the variable some_option, for the options named and
# those that all share; dry_run, preflight and the array `script`.
parse_job() { # "OPTION ..." ARGUMENT ...
  local known=" $1 procs-per-node interface timeout " name
  shift
  procs_per_node='' interface='' timeout=300 dry_run='' preflight='' settings=()
  while (($#)) && [[ $1 != -- ]]; do
    name=${1#--} && name=${name%%=*}
    case $1 in
      -h | --help) print_launcher_help && exit ;;
      --dry-run) dry_run=yes ;;
      --preflight) preflight=yes ;;
      --*=*) option "$name" "${1#*=}" ;;
      --*) option "$name" "${2-}" && shift ;;
      *) usage_error "unknown option $1: the script and its arguments stand after --" ;;
    esac
    shift || break # an option without its value was the last word: the check of the value says so
  done
  number timeout 1
  script=("${@:2}")
}

option() { # NAME VALUE
  [[ $known == *" $1 "* ]] || usage_error "unknown option --$1: the script and its arguments stand after --"
  printf -v "${1//-/_}" %s "$2"
}

number() { # OPTION LEAST
  local value=${1//-/_}
  if ! [[ ${!value} =~ ^[0-9]+$ ]] || ((10#${!value} < $2)); then
    usage_error "expected --$1 N with N of $2 or more, got '${!value}'"
  fi
}

check_script() {
  ((${#script[@]})) || usage_error "no script: expected -- SCRIPT [ARGUMENT ...] after the options"
  [[ ${script[0]} == -m || -f ${script[0]} ]] || die "no such script: '${script[0]}' (looked in $PWD)"
}

# For launchers that reach the other hosts by ssh: sets `procs`, in all, and `threads`, of each; with --hosts also
# `crowded` (more ranks than cores somewhere), `interfaces`, `networks` and `hosts_from_here`, as launch/ask_hosts.py
# says.
ask_hosts() { # PYTHON
  if [[ $hosts && $procs_per_node ]]; then
    usage_error "--hosts says how many ranks each host has: leave --procs-per-node out"
  elif [[ $hosts ]]; then
    local answer
    answer=$("$1" "$root/launch/ask_hosts.py" "$hosts" "$timeout" "$interface" 2>&1) || die "$answer"
    # shellcheck disable=SC2034 # the launchers use them
    read -r procs threads crowded interfaces networks hosts_from_here <<<"$answer"
  else
    number procs-per-node 1
    procs=$procs_per_node threads=$(threads_each "$procs")
  fi
}

threads_each() { # RANKS: of this host, for each of so many ranks
  local threads=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / $1)) # a SLURM job may have less than the node
  echo $((threads > 0 ? threads : 1))
}

# On CPUs, has glibc's malloc keep what is freed: of large tensors it else gives every page back, and each step fetches
# them anew (docs/performance.md). Not where the user has settings, or a malloc, of their own.
keep_memory() {
  if [[ ! -v MALLOC_MMAP_MAX_ && ! -v MALLOC_MMAP_THRESHOLD_ && ! -v MALLOC_TRIM_THRESHOLD_ && ! -v MALLOC_TOP_PAD_ &&
    ${GLIBC_TUNABLES-} != *glibc.malloc.* && ${LD_PRELOAD-} != *malloc* ]] &&
    getconf GNU_LIBC_VERSION >/dev/null 2>&1 && ! has_gpus; then
    # No block from mmap, no trim. MALLOC_MMAP_THRESHOLD_ would do too, but older releases take no more than 32 MiB.
    settings+=(MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=9223372036854775807)
  fi
}

# Of NVIDIA or AMD, and not hidden. nvidia-smi without a driver says so on stdout.
has_gpus() {
  [[ ${CUDA_VISIBLE_DEVICES-all} != @(|-1|NoDevFiles) && (-e /dev/kfd || $(nvidia-smi -L 2>/dev/null) == GPU\ *) ]]
}

# Becomes the launcher, with the variables in the array `settings` added to the environment.
launch() { # COMMAND ...
  local command=(env "${settings[@]}" "$@") doctor=(-m syncbn doctor)
  if [[ $dry_run ]]; then
    [[ ! $preflight ]] || { printf '%q ' "${command[@]}" "${doctor[@]}" && echo; }
    printf '%q ' "${command[@]}" "${script[@]}" && echo
    exit
  fi
  if [[ $preflight ]]; then
    "${command[@]}" "${doctor[@]}" || die "the preflight failed (exit status $?), see above: ${script[*]} was not started"
  fi
  exec "${command[@]}" "${script[@]}"
}
