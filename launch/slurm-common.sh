# Sourced by slurm.sbatch, slurm-srun.sbatch and slurm-rank.sh: what they read of SLURM's variables.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# An error unless these variables are set:  need REMEDY NAME ...
need() {
  local name
  for name in "${@:2}"; do
    [[ ${!name-} ]] || die "$name is not set: $1"
  done
}

# The hosts of a compressed list such as node[1-2], into the array `hosts`, the one of rank 0 first.
read_hosts() {
  local listed
  tool scontrol "install SLURM's client commands on $HOSTNAME, or add their folder to PATH" >/dev/null
  listed=$(scontrol show hostnames "$1") || die "scontrol show hostnames '$1' failed on $HOSTNAME"
  mapfile -t hosts <<<"$listed"
}

# Below 32768, where the ports begin that the system gives to clients. syncbn.init() comes to the same number.
job_port() { echo $((20000 + SLURM_JOB_ID % 10000)); }

# Exports what PyTorch connects by, for this node of a step: MASTER_ADDR, and the interface towards the other nodes.
find_route() {
  local interface=lo address=127.0.0.1 peer route
  if ((${#hosts[@]} > 1)); then
    peer=${hosts[SLURM_NODEID ? 0 : 1]} # not the own name, which is 127.0.1.1 in Debian's /etc/hosts
    address=$(getent ahosts "$peer" | awk '{ print $1; exit }')
    [[ $address ]] || die "$HOSTNAME does not know the address of $peer: add it to DNS or to /etc/hosts"
    route=$(ip -o route get "$address") || die "$HOSTNAME has no route to $peer ($address)"
    [[ $route =~ \ dev\ ([^ ]+).*\ src\ ([^ ]+) && ${BASH_REMATCH[1]} != lo ]] ||
      die "$HOSTNAME reaches $peer ($address) by loopback: correct the address of $peer in its /etc/hosts"
    interface=${BASH_REMATCH[1]}
    ((SLURM_NODEID)) || address=${BASH_REMATCH[2]} # by which the others reach this node
  fi
  export MASTER_ADDR=${MASTER_ADDR:-$address}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
}

check_port_is_free() {
  python3 -c 'import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", int(sys.argv[1])))' "$1" 2>/dev/null ||
    die "port $1 is in use on $HOSTNAME: set MASTER_PORT to a free one when submitting: MASTER_PORT=29500 sbatch ..."
}

# Reads the command line of a batch script into `preflight`, `dry_run` and the array `script`, the nodes of the job into
# `hosts`, and how its steps are started into the array `srun`.
# shellcheck disable=SC2034 # slurm-srun.sbatch and slurm.sbatch read what this sets
parse_slurm_job() {
  preflight='' dry_run=''
  while [[ ${1-} == --* ]]; do
    case $1 in
      --help) print_help && exit ;;
      --preflight) preflight=yes ;;
      --dry-run) dry_run=yes ;;
      *) usage_error "unknown option $1: those of sbatch stand before ${0##*/}, those of the script after the script" ;;
    esac
    shift
  done
  script=("$@")
  ((${#script[@]})) || usage_error "no script: expected SCRIPT [ARGUMENT ...] after the options"
  [[ ${script[0]} == -m || -f ${script[0]} ]] || die "no such script: '${script[0]}' (looked in $PWD)"

  need "there is no allocation here; start the job with sbatch --nodes 2 --ntasks-per-node 1 $0 SCRIPT" \
    SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_TASKS_PER_NODE
  read_hosts "$SLURM_JOB_NODELIST"
  use_environment
  export MASTER_PORT=${MASTER_PORT:-$(job_port)}

  # --kill-on-bad-exit: else the other ranks wait for one that failed. --export: sbatch --export=NONE would else hold for
  # the steps, too. --cpu-bind: a task, or a torchrun and its ranks, may use all the cores that it was given.
  srun=(srun --kill-on-bad-exit=1 --export=ALL --cpu-bind=none)
}

# Becomes a step of the job, or prints the command:  start [SRUN OPTION ...] COMMAND ...
start() {
  if [[ $dry_run ]]; then
    printf '%q ' "${srun[@]}" "$@" && echo
  else
    exec "${srun[@]}" "$@"
  fi
}
