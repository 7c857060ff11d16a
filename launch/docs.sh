#!/usr/bin/env bash
# Usage: launch/docs.sh [--links]
#
# Sets up .venv-syncbn, then builds the documentation site, from docs/ and the docstrings, in build/docs: open index.html
# there. A warning ends it with status 1, after all of them are printed. tests/test_docs.py checks the links within.
#
# Options:
#   --links   instead, try the links to other sites, which needs a network
#   --help    this text
set -euo pipefail
source "$(dirname "$0")/common.sh"

builder=html output=build/docs
case ${1-} in
  '') ;;
  --links) builder=linkcheck output=build/links ;;
  -h | --help) print_help && exit ;;
  *) usage_error "unknown option $1" ;;
esac

cd "$root"
launch/setup.sh --dev
use_environment
python -m sphinx -b "$builder" -W --keep-going -q -d build/docs-trees docs "$output"
say "done: see $output"
