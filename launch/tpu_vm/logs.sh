#!/usr/bin/env bash
# Follows what the training prints on the first worker, or on all: of more than 64 on the first 64, since gcloud runs a
# command on no more at a time, whatever its --batch-size.
#
#   logs.sh [--settings=FILE] [--all] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script --all "$@"
ONE_WORKER=$((1 - OWN_FLAG_GIVEN))
on_workers 'tail -n 100 -F ~/muse_run/train.log'
