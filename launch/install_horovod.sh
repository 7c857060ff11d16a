#!/usr/bin/env bash
# Usage: launch/install_horovod.sh
#
# `syncbn install-horovod` with the versions of constraints.txt, into the active virtual environment or, if none is active,
# the project's. --help says more.
set -euo pipefail
source "$(dirname "$0")/common.sh"
[[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} ]] || use_environment
[[ -n ${VIRTUAL_ENV-}${CONDA_PREFIX-} ]] || die "no active virtual environment and no $environment: run launch/setup.sh"
python=$(tool python3 "the active environment has no Python")
cd "$root" # pip splits the value at spaces
PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt exec "$python" syncbn/cli/_horovod_build.py "$@"
