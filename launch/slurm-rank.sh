#!/usr/bin/env bash
# Usage: srun --kill-on-bad-exit=1 launch/slurm-task.sh launch/slurm-rank.sh [OPTION ...] SCRIPT [ARGUMENT ...]
#
# What each task of launch/slurm-srun.sbatch runs, for batch scripts of your own, too: finds how this node reaches the
# others, tells PyTorch and syncbn.init() by MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, sets
# OMP_NUM_THREADS = cores / tasks of this node unless that is set, and malloc to keep freed memory on CPUs as
# launch/torchrun.sh --help says, and becomes python SCRIPT, or python -m MODULE.
#
# Options:
#   --interface NAME    network interface between the nodes; else the one that the route to the other nodes takes
#   --port P            a free port of the first node (20000 + SLURM_JOB_ID % 10000)
#   --help              this text
set -euo pipefail
source "${0%/*}/slurm-common.sh"

parse_options "interface port" "$@"
need "this is no step of a SLURM job; start it with srun, or use launch/slurm-srun.sbatch" SLURM_JOB_ID SLURM_PROCID \
  SLURM_LOCALID SLURM_NODEID SLURM_GTIDS SLURM_STEP_NODELIST SLURM_STEP_NUM_TASKS
port=${port:-$((20000 + SLURM_JOB_ID % 10000))} # syncbn.init() comes to the same number
number port 1024
read_hosts "$SLURM_STEP_NODELIST"
use_environment
python=$(tool python3 "the active environment has no Python: run launch/setup.sh")
network() { "$python" "$root/launch/network.py" "$@" 2>&1; }

if ((${#hosts[@]} == 1)); then
  head=127.0.0.1 interface=lo
else
  # The first node asks for the route to the second: its own name may be 127.0.1.1, as in Debian, or mean nothing.
  route=$(network head "${hosts[SLURM_NODEID ? 0 : 1]}" "$interface") || die "$route"
  read -r head address interface _ <<<"$route"
  ((SLURM_NODEID)) || head=$address
fi
if ((SLURM_PROCID == 0)); then
  problem=$(network free "$port") || die "$problem; give another --port"
elif ((SLURM_LOCALID == 0)); then # once a node
  problem=$(network reach "$head" "$port" "$interface") || die "$problem"
fi

IFS=, read -ra tasks <<<"$SLURM_GTIDS" # the ranks on this node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_each "${#tasks[@]}")}
# The second =: NCCL would else take the name for a prefix.
export MASTER_ADDR=$head MASTER_PORT=$port GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME="=$interface"
# Python keeps back lines that do not go to a terminal; those of a rank that is killed would be lost.
export PYTHONUNBUFFERED=1
keep_memory
exec env "${settings[@]}" "$python" "${script[@]}"
