#!/usr/bin/env bash
# Usage: launch/docs.sh [FOLDER]
#
# Sets up .venv-syncbn, then builds the documentation site from docs/ and the docstrings into FOLDER (runs/docs): open
# index.html there. A warning ends it with status 1, after all of them are printed. tests/test_docs.py checks the links.
#
# Options:
#   --help   this text
set -euo pipefail
source "$(dirname "$0")/common.sh"

case ${1-} in
  -h | --help) print_help && exit ;;
  -*) usage_error "unknown option $1" ;;
esac
(($# < 2)) || usage_error "expected one FOLDER, got $*"
output=$(realpath -m "${1:-$root/runs/docs}")

cd "$root"
launch/setup.sh --dev
use_environment
python -m sphinx -W --keep-going -q -d runs/docs-trees docs "$output"
say "done: $output/index.html"
