#!/usr/bin/env bash
# Starts the training of the settings on every worker. It outlives this connection; logs.sh follows it.
#
#   start.sh [--settings=FILE] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script '' "$@"
start_training
