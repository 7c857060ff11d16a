# Sourced by slurm.sbatch, slurm-srun.sbatch and slurm-rank.sh: their command line, and what SLURM says of the job.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Reads the command line: as parse_job, but the script may follow the options without --. The array `options` has those
# with a value, to be handed on.
# shellcheck disable=SC2034 # `launch` and the scripts read what this sets
parse_options() { # "OPTION ..." ARGUMENT ...
  local known=" $1 " name
  shift
  dry_run='' preflight='' interface='' port='' options=() settings=()
  while [[ ${1-} == --* ]]; do
    name=${1#--} && name=${name%%=*}
    case $1 in
      --) shift && break ;;
      --help) print_help && exit ;;
      --dry-run) dry_run=yes ;;
      --preflight) preflight=yes ;;
      *)
        [[ $known == *" $name "* ]] ||
          usage_error "unknown option $1: those of sbatch stand before the file, those of the script after the script"
        [[ $1 == *=* ]] || set -- "$1=${2-}" "${@:3}"
        printf -v "${name//-/_}" %s "${1#*=}"
        options+=("$1")
        ;;
    esac
    shift
  done
  script=("$@")
  check_script
}

# An error unless these variables are set.
need() { # REMEDY NAME ...
  local name
  for name in "${@:2}"; do
    [[ ${!name-} ]] || die "$name is not set: $1"
  done
}

# The hosts of a compressed list such as node[1-2], into the array `hosts`; the first is that of rank 0.
read_hosts() { # LIST
  local listed
  tool scontrol "install SLURM's client commands on $HOSTNAME, or set PATH" >/dev/null
  listed=$(scontrol show hostnames "$1") || die "scontrol show hostnames '$1' failed on $HOSTNAME"
  mapfile -t hosts <<<"$listed"
}

# What a batch script is told of its job: the array `hosts`, and `srun`, how to start a step of it; each task runs `task`.
# shellcheck disable=SC2034 # the scripts read what this sets
read_allocation() {
  need "no allocation here; submit this file: sbatch --nodes 2 --ntasks-per-node 1 $0 SCRIPT" \
    SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_TASKS_PER_NODE
  read_hosts "$SLURM_JOB_NODELIST"
  # --kill-on-bad-exit: the other ranks would else wait for one that failed. --export: sbatch --export=NONE would else
  # hold for the steps, too. --cpu-bind: a task, or a torchrun and its ranks, may use all the cores that it was given.
  srun=(srun --kill-on-bad-exit=1 --export=ALL --cpu-bind=none)
  task=$root/launch/slurm-task.sh
}
