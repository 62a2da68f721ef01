#!/usr/bin/env bash
# Stops the training on every worker: each saves its step and ends. The slice stays; start.sh goes on from there.
#
#   stop.sh [--settings=FILE] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script '' "$@"
stop_training
