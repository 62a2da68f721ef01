#!/usr/bin/env bash
# Deletes the slice and its queued resource. The run's checkpoints in the bucket stay.
#
#   delete.sh [--settings=FILE] [--yes] [--dry-run]
#
# gcloud asks before it deletes; --yes answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script --yes "$@"
if [ "$OWN_FLAG_GIVEN" = 1 ]; then delete_slice --quiet; else delete_slice; fi
