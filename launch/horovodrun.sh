#!/usr/bin/env bash
# Usage: launch/horovodrun.sh --procs-per-node N [OPTION ...] -- SCRIPT [ARGUMENT ...]
#
# `syncbn launch horovodrun` in the project's environment. --help lists the options.
set -euo pipefail
source "$(dirname "$0")/common.sh"
launch horovodrun "$@"
