#!/usr/bin/env bash
# Usage: launch/torchrun.sh --procs-per-node N [OPTION ...] -- SCRIPT [ARGUMENT ...]
#        launch/torchrun.sh --nodes M --procs-per-node N --master HOST [OPTION ...] -- SCRIPT [ARGUMENT ...]
#
# Runs a training script in N ranks on this host, or on each of M hosts, started by PyTorch's torchrun. For several hosts
# give the same command on each, within --timeout. HOST is the head node: one of them, that the others can connect to.
# Example: launch/torchrun.sh --nodes 2 --procs-per-node 2 --master node1 -- examples/detect_digits.py --steps 50
#
# Options:
#   --nodes M           hosts (1)
#   --master HOST       name or address of the head node
#   --port P            a free port of the head node (20000 + SLURM_JOB_ID % 10000 in a SLURM job, else 29400)
#   --max-restarts R    how often all ranks are started again after one has failed (0)
set -euo pipefail
source "$(dirname "$0")/common.sh"

nodes=1 master='' port=29400 max_restarts=0
[[ ! ${SLURM_JOB_ID-} ]] || port=$((20000 + SLURM_JOB_ID % 10000))
parse_job "nodes master port max-restarts" "$@"
number nodes 1
number procs-per-node 1
number port 1024
number max-restarts 0
check_script
use_environment
torchrun=$(tool torchrun "it comes with PyTorch: run launch/setup.sh, or activate an environment with torch")

settings+=(
  "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_each "$procs_per_node")}"
  # With one store for rendezvous and workers, ranks that are started again read the addresses of dead ones:
  # pytorch#167288.
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
)
keep_memory
ranks=(--nproc-per-node="$procs_per_node" --max-restarts="$max_restarts")

if ((nodes == 1)); then
  # Gloo would go by the address of the host's own name, which may be another host's or none. All ranks are on this one.
  # (NCCL looks at the interfaces, not at the name.)
  settings+=("GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}")
  # --standalone: a rendezvous of its own on a free port, so that jobs on one host do not meet.
  # --local-addr: ranks would else look for rank 0 by the host's own name, and wait for ever where that does not resolve.
  launch "$torchrun" --standalone --local-addr=127.0.0.1 "${ranks[@]}"
fi

[[ $master ]] || usage_error "$nodes hosts need --master HOST, the name or address of one that the others can connect to"
python=$(tool python3 "the active environment has no Python: run launch/setup.sh")
route=$("$python" "$root/launch/network.py" head "$master" "$interface" 2>&1) || die "$route"
read -r head address interface is_head <<<"$route"

# One name: Gloo would want each of several to be there. The second =: NCCL would else take it for a prefix.
settings+=("GLOO_SOCKET_IFNAME=$interface" "NCCL_SOCKET_IFNAME==$interface")
rendezvous=(
  --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="${SLURM_JOB_ID:-syncbn}"
  # is_host: torch would tell by the host's own name. join_timeout: ten minutes.
  --rdzv-conf="is_host=$is_head,join_timeout=$timeout"
  # What this host announces to the others if rank 0 is here; its own name, else.
  --local-addr="$address"
)
launch "$python" "$root/launch/together.py" --head "$head" --port "$port" --address "$address" --is-head "$is_head" \
  --nodes "$nodes" --timeout "$timeout" -- "$torchrun" "${rendezvous[@]}" "${ranks[@]}"
