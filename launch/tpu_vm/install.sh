#!/usr/bin/env bash
# Copies this checkout (its last commit) to every worker and installs it there.
#
#   install.sh [--settings=FILE] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

start_script '' "$@"
install_package
