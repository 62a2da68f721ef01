#!/usr/bin/env bash
# Queues a TPU slice (or several), as the settings say.
#
#   create.sh [--settings=FILE] [--wait] [--dry-run]
#
# --wait returns when the slice is ready, or with an error when it will not become so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

wait_until_ready() {
  local state unknown=0
  while true; do
    state=$(slice_state)
    echo "$(date +%T) $NAME: $state"
    count_unknown "$state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPED | MISSING)
        die "$NAME is $state. What happened: gcloud compute tpus queued-resources describe $NAME" \
          "--project=$PROJECT --zone=$ZONE. Then delete.sh, and create.sh again, or let watch.sh do it."
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

start_script --wait "$@"
create_slice
if [ "$OWN_FLAG_GIVEN" = 1 ]; then
  if [ "$DRY_RUN" = 1 ]; then
    echo "# then wait until $NAME is ready, looking every $POLL_SECONDS s"
  else
    wait_until_ready
  fi
fi
