#!/usr/bin/env bash
# Usage: launch/demo.sh [--steps N]
#
# Sets up .venv-syncbn, then trains the digit detector three ways from the same seed: one process with the whole batch of
# 8; 4 processes with 2 images each and local batch norm; the same with synchronised batch norm. Prints a table that
# compares them and leaves it, with pictures of the curves and of detections, in runs/demo. What was there is removed.
#
# Options:
#   --steps N   training steps of each (500)
#   --help      this text
set -euo pipefail
source "$(dirname "$0")/common.sh"

steps=500
while (($#)); do
  case $1 in
    -h | --help) print_help && exit ;;
    --steps) steps=${2-} && shift ;;
    --steps=*) steps=${1#*=} ;;
    *) usage_error "unknown option $1" ;;
  esac
  shift || break # --steps was the last word: the check of its value says so
done
[[ $steps =~ ^[1-9][0-9]*$ ]] || usage_error "expected --steps N with N of 1 or more, got '$steps'"

cd "$root"
launch/setup.sh
use_environment
rm -rf runs/demo

train() { # NAME PROCESSES IMAGES NORM
  say "training '$1': $2 x $3 images, --norm $4, $steps steps"
  # float64, so that what the table shows is the difference between the methods, not rounding that training amplifies.
  launch/torchrun.sh --procs-per-node "$2" -- examples/detect_digits.py --dtype float64 --seed 0 --steps "$steps" \
    --images-per-process "$3" --norm "$4" --output "runs/demo/$1"
}
train whole-batch 1 8 batch
train local 4 2 batch
train sync 4 2 sync

python examples/compare_runs.py --output runs/demo runs/demo/{whole-batch,local,sync}
