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
# (syncbn.init sets it anew, to its own timeout.)
flags=(-np "$procs" --gloo --gloo-timeout-seconds 120)

# -H: by a name that stands for nothing it would look for this host over ssh.
# --disable-cache: it would remember for an hour that a host could be reached.
[[ ! $hosts ]] ||
  flags+=(-H "$hosts_from_here" --network-interfaces "$interfaces" --start-timeout "$timeout" --disable-cache)

settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}")
keep_memory
launch "$horovodrun" "${flags[@]}" "$python"
