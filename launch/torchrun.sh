#!/usr/bin/env bash
# Usage: launch/torchrun.sh --procs-per-node N [OPTION ...] -- SCRIPT [ARGUMENT ...]
#
# `syncbn launch torchrun` in the project's environment. --help lists the options.
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch torchrun "$@"
