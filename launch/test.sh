#!/usr/bin/env bash
# Usage: launch/test.sh [--cluster] [ARGUMENT ...]
#
# Everything that is checked before a commit, here and in CI: sets up .venv-syncbn with the development tools and Horovod,
# then runs ruff, mypy, shellcheck, hadolint, actionlint and pytest. The arguments go to pytest: launch/test.sh -k convert
#
# Options:
#   --cluster   instead, jobs over several hosts, which are network namespaces of this one (tests/cluster). They need root,
#               and the Debian packages below, which this installs
#   --help      this text
set -euo pipefail
source "$(dirname "$0")/common.sh"

cluster='' cluster_packages=(iproute2 openssh-server slurmctld slurmd slurm-client munge)
case ${1-} in
  -h | --help) print_help && exit ;;
  --cluster) cluster=yes && shift ;;
esac

cd "$root"
launch/setup.sh --dev
use_environment # whatever other environment is active: Horovod goes into the project's
launch/install_horovod.sh

check() {
  say "$*"
  "$@"
}
if [[ $cluster ]]; then
  if ((EUID == 0)) && command -v apt-get >/dev/null && ! dpkg -s "${cluster_packages[@]}" >/dev/null 2>&1; then
    say "installing ${cluster_packages[*]}"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "${cluster_packages[@]}" >/dev/null
  fi
  check python -m pytest tests/cluster "$@"
  exit
fi
check ruff check
check ruff format --check
check mypy
check shellcheck --external-sources --source-path=SCRIPTDIR launch/*.sh launch/*.sbatch docker/*.sh .ci/run
check hadolint --config docker/hadolint.yaml docker/Dockerfile docker/Dockerfile.cuda
check actionlint
check python -m pytest "$@"
say "passed: ruff, mypy, shellcheck, hadolint, actionlint, pytest"
