#!/usr/bin/env bash
# Usage: launch/horovodrun.sh --procs-per-node N [--dry-run] -- SCRIPT [ARGUMENT ...]
#
# Runs a training script in N processes on this host, started by horovodrun (launch/install_horovod.sh installs it).
# Example: launch/horovodrun.sh --procs-per-node 2 -- examples/detect_digits.py --steps 50
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_job "$@"
use_environment
remedy="run launch/install_horovod.sh"
horovodrun=$(tool horovodrun "$remedy")
python=$(tool python3 "$remedy")

# Horovod's process sets forget the network interface and go by the host's own name: without this check, a segmentation
# fault where the name resolves to nothing, an abort where it resolves to another host.
"$python" -c 'import socket; socket.socket().bind((socket.gethostname(), 0))' 2>/dev/null ||
  die "Horovod needs this host's name to resolve to an address of this host: add '127.0.1.1 $HOSTNAME' to /etc/hosts"

settings=()
# --gloo: a Horovod built with MPI would else start mpirun.
# --gloo-timeout-seconds: how far apart ranks may reach hvd.init(). 30 s, the default, is short on a busy machine.
launch "$horovodrun" -np "$procs" --gloo --gloo-timeout-seconds 120 "$python"
