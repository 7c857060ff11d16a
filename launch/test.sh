#!/usr/bin/env bash
# Usage: launch/test.sh [ARGUMENT ...]
#
# Everything that is checked before a commit, here and in CI: sets up .venv with the development tools and Horovod, then
# runs ruff, mypy, shellcheck, hadolint and pytest. The arguments go to pytest: launch/test.sh -k convert
set -euo pipefail
source "$(dirname "$0")/common.sh"

[[ ${1-} != -h && ${1-} != --help ]] || { print_help && exit; }

cd "$root"
launch/setup.sh --dev
use_environment # whatever other environment is active: Horovod goes into .venv
launch/install_horovod.sh

check() {
  say "$*"
  "$@"
}
check ruff check
check ruff format --check
check mypy
check shellcheck --external-sources --source-path=SCRIPTDIR launch/*.sh docker/*.sh .ci/run
check hadolint --config docker/hadolint.yaml docker/Dockerfile docker/Dockerfile.cuda
check python -m pytest "$@"
say "passed: ruff, mypy, shellcheck, hadolint, pytest"
