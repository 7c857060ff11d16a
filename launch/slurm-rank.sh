#!/usr/bin/env bash
# Usage: srun --kill-on-bad-exit=1 launch/slurm-rank.sh SCRIPT [ARGUMENT ...]
#
# What each task of launch/slurm-srun.sbatch runs: finds how its node reaches the others, sets the variables that
# PyTorch reads, and becomes python SCRIPT (or python -m MODULE). For batch scripts of your own, too.
#
# Sets MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, and OMP_NUM_THREADS = cores / tasks of this node,
# each of them unless it is set.
set -euo pipefail
source "${0%/*}/slurm-common.sh"

[[ ${1-} != -h && ${1-} != --help ]] || { print_help && exit; }
(($#)) || usage_error "no script: expected SCRIPT [ARGUMENT ...]"
need "this is no step of a SLURM job; start it with srun, or use launch/slurm-srun.sbatch" SLURM_JOB_ID SLURM_PROCID \
  SLURM_STEP_NUM_TASKS SLURM_STEP_NODELIST SLURM_NODEID SLURM_GTIDS SLURM_CPUS_ON_NODE
use_environment
python=$(tool python3 "run launch/setup.sh, or activate an environment with torch")

read_hosts "$SLURM_STEP_NODELIST"
export MASTER_PORT=${MASTER_PORT:-$(job_port)}
find_route
# A task on the first node that is not rank 0 does not listen.
((SLURM_PROCID)) || check_port_is_free "$MASTER_PORT"

IFS=, read -ra tasks <<<"$SLURM_GTIDS" # the numbers of the tasks on this node
threads=$((SLURM_CPUS_ON_NODE / ${#tasks[@]}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Python keeps back lines that do not go to a terminal; those of a process that is killed would be lost.
export PYTHONUNBUFFERED=1
exec "$python" "$@"
