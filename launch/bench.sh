#!/usr/bin/env bash
# Usage: launch/bench.sh [--dry-run] [OPTION ...]
#
# Runs the benchmark of docs/performance.md in 2 processes of one thread each. The options are those of
# `syncbn bench`; --help of that lists them. The project's own bars come last.
set -euo pipefail
source "$(dirname "$0")/common.sh"

dry_run=()
case ${1-} in
  -h | --help) print_help && exit ;;
  --dry-run) dry_run=(--dry-run) && shift ;;
esac
OMP_NUM_THREADS=1 exec "$root/launch/torchrun.sh" --procs-per-node 2 "${dry_run[@]}" -- "$root/benchmarks/bars.py" "$@"
