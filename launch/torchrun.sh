#!/usr/bin/env bash
# Usage: launch/torchrun.sh --procs-per-node N [--dry-run] -- SCRIPT [ARGUMENT ...]
#
# Runs a training script in N processes on this host, started by PyTorch's torchrun.
# Example: launch/torchrun.sh --procs-per-node 2 -- examples/detect_digits.py --steps 50
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_job "$@"
use_environment
torchrun=$(tool torchrun "it comes with PyTorch: run launch/setup.sh, or activate an environment with torch")

settings=(
  # With one store for rendezvous and workers, ranks that are started again read the addresses of dead ones:
  # pytorch#167288.
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # Gloo would go by the address of the host's own name, which may be another host's or none. All ranks are on this one.
  # (NCCL looks at the interfaces, not at the name.)
  "GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}"
)
# --standalone: a rendezvous of its own on a free port, so that jobs on one host do not meet.
# --local-addr: ranks would else look for rank 0 by the host's own name, and wait for ever where that does not resolve.
launch "$torchrun" --standalone --local-addr=127.0.0.1 --nproc-per-node="$procs"
