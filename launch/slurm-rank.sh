#!/usr/bin/env bash
# Usage: srun --kill-on-bad-exit=1 launch/slurm-rank.sh [OPTION ...] SCRIPT [ARGUMENT ...]
#
# `syncbn launch slurm-rank` in the project's environment. --help lists the options.
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch slurm-rank "$@"
