#!/usr/bin/env bash
# Follows what the training prints on the first worker, or on all.
#
#   logs.sh [--settings=FILE] [--all] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script "$@"
ONE_WORKER=1
for flag in "${OTHER_FLAGS[@]+"${OTHER_FLAGS[@]}"}"; do
  [ "$flag" = --all ] || die "unknown flag $flag; --help shows those there are"
  ONE_WORKER=0
done
on_workers 'tail -n 100 -F ~/muse_run/train.log'
