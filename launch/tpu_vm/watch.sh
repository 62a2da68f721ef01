#!/usr/bin/env bash
# Keeps a run going until it is finished: creates the slice, installs, starts, and after a preemption or a failure of
# the slice does so again. Training then goes on from its last checkpoint in the bucket. A crash of the training itself
# is started again too, up to MAX_CRASHES times in a row; workers that do not answer, and a gcloud that
# cannot tell, are waited for, MAX_UNREACHABLE looks in a row. Run it where it can stay, in tmux on a small machine.
#
#   watch.sh [--settings=FILE] [--delete-when-finished] [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

say() {
  echo "$(date '+%F %T') $*"
}

# What the training does, in one word, from what all workers say.
training_state() {
  local answers
  if ! answers=$(on_workers "if [ -d ~/muse_jax/launch ]; then $WORKER_SCRIPT status; else echo 'training: none'; fi"); then
    echo unreachable
    return
  fi
  answers=$(grep -o 'training: .*' <<<"$answers" || true)
  if [ -z "$answers" ]; then
    echo unreachable
  elif grep -q 'exited' <<<"$answers" && ! grep -qv 'exited 0$' <<<"$answers"; then
    echo finished
  elif grep -q 'exited [^0]\|lost' <<<"$answers"; then
    # SIGTERM: the machine was told to go, the step is saved. A worker that ended otherwise tells more.
    if grep -q 'exited [^0]\|lost' <<<"$(grep -v 'exited 143$' <<<"$answers")"; then echo crashed; else echo stopped; fi
  elif grep -q 'none' <<<"$answers"; then
    echo none
  else
    echo running
  fi
}

# A worker that still waits for the lost one must end first: two runs in one workdir are refused.
restart_training() {
  stop_training && start_training
}

# A worker that never answers again, on a slice that is ACTIVE, is nothing that waiting mends.
count_unreachable() {
  unreachable=$((unreachable + 1))
  if [ "$unreachable" -gt "$MAX_UNREACHABLE" ]; then
    die "not all workers of $NAME answered, $unreachable times in a row, though it is ACTIVE; above is what gcloud" \
      "says. The slice still runs: delete.sh ends it."
  fi
  if [ $((unreachable % 10)) = 0 ]; then say "training: unreachable, $unreachable times in a row"; fi
}

look_at_training() {
  local training
  training=$(training_state)
  [ "$training" = "$last_training" ] || say "training: $training"
  last_training=$training
  case $training in
    none | stopped | running) counted=0 ;;
  esac
  if [ "$training" = unreachable ]; then count_unreachable; else unreachable=0; fi
  case $training in
    finished) return 1 ;;
    none) { install_package && restart_training; } || say "could not start; trying again" ;;
    stopped) restart_training || say "could not start; trying again" ;;
    crashed)
      if [ "$counted" = 0 ]; then # where it could not be started again, the same crash is seen once more
        crashes=$((crashes + 1)) counted=1
        if [ "$crashes" -gt "$MAX_CRASHES" ]; then
          die "training crashed $crashes times in a row; logs.sh shows why. The slice still runs: delete.sh ends it."
        fi
        say "crash $crashes of at most $MAX_CRASHES in a row"
      fi
      if restart_training; then counted=0 running_since=$SECONDS; else say "could not start; trying again"; fi
      ;;
    running)
      # an hour without a crash: whatever it was is over
      if [ $((SECONDS - running_since)) -ge 3600 ]; then crashes=0; fi
      ;;
  esac
}

watch() {
  local state last_state='' last_training='' crashes=0 counted=0 unreachable=0 unknown=0 running_since=$SECONDS
  while true; do
    state=$(slice_state)
    [ "$state" = "$last_state" ] || say "$NAME: $state"
    last_state=$state
    count_unknown "$state"
    case $state in
      ACTIVE) look_at_training || break ;;
      MISSING) create_slice || say "could not create; trying again" ;;
      PREEMPTED | FAILED | SUSPENDED | TERMINATED | STOPPED)
        say "making $NAME anew"
        if delete_slice --quiet; then create_slice || say "could not create; trying again"; fi
        last_training='' unreachable=0
        ;;
      *) ;; # on its way, or gcloud could not tell: look again
    esac
    sleep "$POLL_SECONDS"
  done
  say "training is finished: $WORKDIR"
}

# Every command that the loop may give, in the order of a run that is preempted once.
show_plan() {
  echo "# every $POLL_SECONDS s: the state of the queued resource $NAME, of its slices, and of the training on them"
  echo "# where there is none:"
  create_slice
  echo "# where nothing runs on it yet:"
  install_package
  restart_training
  echo "# where the training ended otherwise than with exit code 0:"
  restart_training
  echo "# where it is PREEMPTED, FAILED, SUSPENDED, TERMINATED or STOPPED: this, then the above again"
  delete_slice --quiet
  echo "# until training has ended with exit code 0 on all workers"
}

start_script --delete-when-finished "$@"
if [ "$DRY_RUN" = 1 ]; then show_plan; else watch; fi
if [ "$OWN_FLAG_GIVEN" = 1 ]; then delete_slice --quiet; fi
