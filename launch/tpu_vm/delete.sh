#!/usr/bin/env bash
# Deletes the slice and its queued resource. The run's checkpoints in the bucket stay.
#
#   delete.sh [--settings=FILE] [--yes] [--dry-run]
#
# gcloud asks before it deletes; --yes answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script "$@"
quiet=()
for flag in "${OTHER_FLAGS[@]+"${OTHER_FLAGS[@]}"}"; do
  [ "$flag" = --yes ] || die "unknown flag $flag; --help shows those there are"
  quiet=(--quiet)
done
delete_slice "${quiet[@]+"${quiet[@]}"}"
