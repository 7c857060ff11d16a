#!/usr/bin/env bash
# Usage: launch/test-integrations.sh [ARGUMENT ...]
#
# syncbn inside other libraries: makes an environment with the packages of launch/integrations.txt (6 GB, most of it
# PyTorch and what its GPU build needs; no GPU is used), runs tests/integrations there and, if all of it was run and
# passed, writes the table of results into docs/integrations.md. The arguments go to pytest: -k lightning
#
# Options:
#   --help    this text
#
# SYNCBN_INTEGRATIONS_VENV names another folder for the environment than .venv-integrations.
set -euo pipefail
case ${1-} in
  -h | --help) source "$(dirname "$0")/common.sh" && print_help && exit ;;
esac
export SYNCBN_VENV=${SYNCBN_INTEGRATIONS_VENV:-.venv-integrations}
source "$(dirname "$0")/common.sh"

cd "$root"
launch/setup.sh --integrations
use_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
(($#)) || set -- --table docs/integrations.md
python -m pytest tests/integrations "$@"
