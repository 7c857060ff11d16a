#!/usr/bin/env bash
# Usage: launch/horovodrun.sh --procs-per-node N [OPTION ...] -- SCRIPT [ARGUMENT ...]
#        launch/horovodrun.sh --hosts HOST:N,HOST:N,... [OPTION ...] -- SCRIPT [ARGUMENT ...]
#
# Runs a training script in N ranks on this host, or on each of several, started by horovodrun (launch/install_horovod.sh
# installs it). Give the command on one host; it reaches the others by ssh, which must not ask for a password
# (~/.ssh/config has its settings).
# Example: launch/horovodrun.sh --hosts node1:2,node2:2 -- examples/detect_digits.py --steps 50
#
# Options:
#   --hosts HOST:N,...  the hosts, each with its number of ranks
set -euo pipefail
source "$(dirname "$0")/common.sh"

hosts=''
parse_job hosts "$@"
check_script
use_environment
remedy="run launch/install_horovod.sh"
horovodrun=$(tool horovodrun "$remedy")
python=$(tool python3 "$remedy")
ask_hosts "$python"

# --gloo: a Horovod built with MPI would else start mpirun.
# --gloo-timeout-seconds: how far apart ranks may reach hvd.init(). 30 s, the default, is short on a busy machine.
flags=(-np "$procs" --gloo --gloo-timeout-seconds 120)

# Horovod's process sets forget the network interface and go by the host's own name: without these checks, a segmentation
# fault where the name resolves to nothing, an abort where it resolves to another host, or to 127.0.1.1 among several.
if [[ $hosts ]]; then
  if [[ $misnamed != - ]]; then
    IFS='=' read -r name address wrong <<<"$misnamed"
    die "Horovod needs each host's own name to stand for its address: on $name it stands for $wrong. Write" \
      "'$address $name' into /etc/hosts there, or use launch/torchrun.sh or launch/mpirun.sh, which do not need it"
  fi
  # --disable-cache: it would remember for an hour that a host could be reached.
  flags+=(-H "$hosts" --network-interfaces "$interfaces" --start-timeout "$timeout" --disable-cache)
else
  "$python" -c 'import socket; socket.socket().bind((socket.gethostname(), 0))' 2>/dev/null ||
    die "Horovod needs this host's name to resolve to an address of this host: add '127.0.1.1 $HOSTNAME' to /etc/hosts"
fi

settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}")
launch "$horovodrun" "${flags[@]}" "$python"
