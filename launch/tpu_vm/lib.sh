# shellcheck shell=bash
# What the scripts of this folder share: flags, settings, and the few things asked of gcloud. Sourced, not run.

unset CDPATH # with it cd prints where it went
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
DRY_RUN=0
WORKER_SCRIPT='bash ~/muse_jax/launch/tpu_vm/on_worker.sh'
NEEDED=(PROJECT ZONE NAME ACCELERATOR_TYPE SLICES CAPACITY CONFIG WORKDIR PYTHON_VERSION)
LISTS=(TRAIN_ARGS CREATE_ARGS SSH_ARGS)
OPTIONAL=(RUNTIME_VERSION DATA_BUCKET POLL_SECONDS MAX_CRASHES MAX_UNREACHABLE)

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# Prints the comment at the top of the running script, which says what it does and its flags.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
}

# start_script OWN_FLAG ARGUMENTS...: takes --settings and --dry-run from the arguments and loads the settings. OWN_FLAG
# is the one that this script has besides, or empty; OWN_FLAG_GIVEN says whether it was given.
start_script() {
  local settings=$HERE/settings.sh own=$1 flag
  OWN_FLAG_GIVEN=0
  for flag in "${@:2}"; do
    case $flag in
      --settings=*) settings=${flag#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      --help | -h)
        usage
        exit 0
        ;;
      *)
        [ -n "$own" ] && [ "$flag" = "$own" ] || die "unknown flag '$flag'; --help shows those there are"
        # shellcheck disable=SC2034 # the script that was called reads it
        OWN_FLAG_GIVEN=1
        ;;
    esac
  done
  [ -f "$settings" ] || die "there is no settings file $settings; copy $HERE/settings.sh and name it with --settings=FILE"
  [[ $settings == /* ]] || settings=./$settings # or bash would look along PATH
  ! grep -q $'\r' "$settings" ||
    die "$settings has Windows' line ends (CRLF), expected are LF's alone: sed -i 's/\r\$//' $settings"
  unset "${NEEDED[@]}" "${LISTS[@]}" "${OPTIONAL[@]}" # the file alone counts, not what the shell exports
  # shellcheck source=settings.sh
  source "$settings"
  check_settings "$settings"
  [ "$DRY_RUN" = 1 ] || command -v gcloud >/dev/null ||
    die "gcloud is not installed here: https://cloud.google.com/sdk/docs/install"
}

# Fails before anything is paid for if a setting is missing or cannot work.
check_settings() {
  local name word node
  for name in "${NEEDED[@]}"; do
    [ -n "${!name:-}" ] || die "$1: $name is not set"
    [[ ${!name} != *YOUR_* ]] || die "$1: $name is still ${!name}; put your own value in its place"
  done
  for name in "${LISTS[@]}"; do
    [ -z "${!name+set}" ] || [[ $(declare -p "$name") == 'declare -a'* ]] ||
      die "$1: $name must be a list in parentheses: $name=(--one=1 --two=2)"
  done
  for name in "${LISTS[@]}" "${OPTIONAL[@]}"; do
    [[ $(declare -p "$name" 2>/dev/null) != *YOUR_* ]] ||
      die "$1: $name has YOUR_ in it still; put your own value in its place"
  done
  : "${RUNTIME_VERSION:=}" "${DATA_BUCKET:=}" "${POLL_SECONDS:=60}" "${MAX_CRASHES:=5}" "${MAX_UNREACHABLE:=30}"
  TRAIN_ARGS=("${TRAIN_ARGS[@]+"${TRAIN_ARGS[@]}"}")
  CREATE_ARGS=("${CREATE_ARGS[@]+"${CREATE_ARGS[@]}"}")
  SSH_ARGS=("${SSH_ARGS[@]+"${SSH_ARGS[@]}"}")
  [[ $SLICES =~ ^[1-9][0-9]{0,3}$ ]] || die "$1: SLICES is '$SLICES'; it must be a whole number from 1 to 9999"
  [[ $POLL_SECONDS =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "$1: POLL_SECONDS is '$POLL_SECONDS'; it must be a number of seconds"
  [[ $MAX_CRASHES =~ ^[0-9]+$ ]] || die "$1: MAX_CRASHES is '$MAX_CRASHES'; it must be a whole number"
  [[ $MAX_UNREACHABLE =~ ^[0-9]+$ ]] || die "$1: MAX_UNREACHABLE is '$MAX_UNREACHABLE'; it must be a whole number"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "$1: NAME is '$NAME'; it must be at most 63 lower-case letters, digits and hyphens, and start with a letter"
  node=$NAME-$((SLICES - 1))
  [ "$SLICES" = 1 ] || [ ${#node} -le 63 ] ||
    die "$1: NAME is '$NAME'; its last slice is $node, and names have at most 63 characters: shorten it"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] || die "$1: ZONE is '$ZONE'; expected is one as us-central2-b"
  [ -f "$ROOT/${CONFIG%%:*}" ] ||
    die "$1: CONFIG is '$CONFIG', which is no file of this checkout; write it from $ROOT on, as configs/base_3b.py"
  case $CAPACITY in
    on-demand | spot | reserved) ;;
    *) die "$1: CAPACITY is '$CAPACITY'; it must be on-demand, spot or reserved" ;;
  esac
  [[ $WORKDIR =~ ^gs://[a-z0-9][-_.a-z0-9]+(/|$) ]] ||
    die "$1: WORKDIR is '$WORKDIR'; it must be in a bucket (gs://BUCKET/...), since the disks of a preempted slice are lost"
  [[ $DATA_BUCKET =~ ^([a-z0-9][-_.a-z0-9]+)?$ ]] ||
    die "$1: DATA_BUCKET is '$DATA_BUCKET'; it must be a bucket's name alone, without gs:// and folders"
  for word in "${TRAIN_ARGS[@]+"${TRAIN_ARGS[@]}"}"; do
    # the last of a flag counts
    [[ ! $word =~ ^--?(config|workdir)(=|$) ]] ||
      die "$1: TRAIN_ARGS has '$word', which CONFIG or WORKDIR says; set that, and leave this out"
  done
  check_accelerator "$1"
}

# Sets RUNTIME_VERSION where it is empty, and fails on an accelerator that these scripts do not know, or of which there
# is no slice of that size: a host of v4 and v5p has 8 cores.
check_accelerator() {
  local usual size
  case $ACCELERATOR_TYPE in
    v4-*) usual=tpu-ubuntu2204-base ;;
    v5litepod-*) usual=v2-alpha-tpuv5-lite ;;
    v5p-*) usual=v2-alpha-tpuv5 ;;
    v6e-*) usual=v2-alpha-tpuv6e ;;
    *) die "$1: ACCELERATOR_TYPE is '$ACCELERATOR_TYPE'; it must be v4-N, v5litepod-N (v5e), v5p-N or v6e-N" ;;
  esac
  [[ ${ACCELERATOR_TYPE##*-} =~ ^[1-9][0-9]{0,4}$ ]] ||
    die "$1: ACCELERATOR_TYPE is '$ACCELERATOR_TYPE'; after the last hyphen a number is expected, as in v4-512"
  size=${ACCELERATOR_TYPE##*-}
  case $ACCELERATOR_TYPE in
    v4-* | v5p-*)
      [ $((size % 8)) = 0 ] ||
        die "$1: ACCELERATOR_TYPE is '$ACCELERATOR_TYPE'; a host has 8 cores: expected is a multiple of 8"
      ;;
    *)
      [[ ' 1 4 8 16 32 64 128 256 ' == *" $size "* ]] ||
        die "$1: ACCELERATOR_TYPE is '$ACCELERATOR_TYPE'; slices have 1, 4, 8, 16, 32, 64, 128 or 256 chips"
      ;;
  esac
  : "${RUNTIME_VERSION:=$usual}"
}

# Runs a command; with --dry-run only prints it, as it could be pasted into a shell.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpus() {
  run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

# Runs an ssh or scp of gcloud, and fails where it did not reach all nodes: gcloud warns, leaves those out, and exits 0.
# In a subshell, whose end removes the file however it comes.
reach_nodes() (
  errors=$(mktemp)
  trap 'rm -f "$errors"' EXIT
  { tpus queued-resources "$@" 2>&1 >&3 3>&- | tee "$errors" >&2; } 3>&1 || exit
  if grep -q 'Could not prepare all' "$errors"; then
    die "not all nodes of $NAME were reached, and nothing was done on the others. One may be preempted; or an" \
      "ssh-agent runs that lacks gcloud's key: ssh-add ~/.ssh/google_compute_engine"
  fi
)

# Runs a shell command on every worker of every slice, or with ONE_WORKER=1 on the first alone.
on_workers() {
  local which=all
  [ "${ONE_WORKER:-0}" = 0 ] || which=0
  # standard input is closed: ssh would otherwise eat what a loop around it reads
  reach_nodes ssh "$NAME" --node="$which" --worker="$which" --command="$1" \
    "${SSH_ARGS[@]+"${SSH_ARGS[@]}"}" </dev/null
}

copy_to_workers() {
  reach_nodes scp "$1" "$NAME:$2" --node=all --worker=all "${SSH_ARGS[@]+"${SSH_ARGS[@]}"}"
}

create_slice() {
  local nodes=(--node-id="$NAME") capacity=()
  [ "$SLICES" -eq 1 ] || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  [ "$CAPACITY" = on-demand ] || capacity=(--"$CAPACITY")
  tpus queued-resources create "$NAME" "${nodes[@]}" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" "${capacity[@]+"${capacity[@]}"}" "${CREATE_ARGS[@]+"${CREATE_ARGS[@]}"}"
}

# --force deletes the slice itself too; without it a queued resource that still has one is refused.
delete_slice() {
  tpus queued-resources delete "$NAME" --force "$@"
}

# Asks gcloud for one value; prints MISSING where there is no such thing, UNKNOWN where gcloud could not tell.
ask() {
  local errors answer
  errors=$(mktemp)
  if answer=$(gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -q 'NOT_FOUND' "$errors"; then # the API's own word: a broken connection may speak of things not found too
    echo MISSING
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# The state of the queued resource; of an ACTIVE one, the first state of its slices that is not READY.
slice_state() {
  local state index node node_state
  state=$(ask queued-resources describe "$NAME" --format='value(state.state)')
  if [ "$state" = ACTIVE ]; then
    for ((index = 0; index < SLICES; index++)); do
      node=$NAME
      [ "$SLICES" -eq 1 ] || node=$NAME-$index
      node_state=$(ask tpu-vm describe "$node" --format='value(state)')
      if [ "$node_state" != READY ]; then
        state=$node_state
        # A slice that is gone from under its queued resource was preempted and cleared away.
        [ "$node_state" != MISSING ] || state=PREEMPTED
        break
      fi
    done
  fi
  echo "$state"
}

# Ends a loop over states in which gcloud can't tell any more: without a login, or a network, it would have no end.
# `unknown` is the loop's.
count_unknown() {
  if [ "$1" != UNKNOWN ]; then
    unknown=0
    return
  fi
  unknown=$((unknown + 1))
  [ "$unknown" -le "$MAX_UNREACHABLE" ] ||
    die "gcloud could not tell the state of $NAME, $unknown times in a row; above is what it says. If it asks for a" \
      "login: gcloud auth login. The slice, if there is one, still runs."
}

# The archive is removed once it is unpacked: a copy that never came would otherwise install it again.
# One chain of &&: a caller may have turned off `set -e`, and a half-done install must not go on.
install_package() {
  local folder=${TMPDIR:-/tmp}
  [ "$DRY_RUN" = 1 ] || folder=$(mktemp -d "$folder/muse_jax.XXXXXX")
  local archive=$folder/muse_jax.tar.gz status=0
  if [ -n "$(git -C "$ROOT" status --porcelain)" ]; then
    echo "note: $ROOT has changes that are not committed; the workers get the last commit" >&2
  fi
  run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD &&
    copy_to_workers "$archive" muse_jax.tar.gz &&
    on_workers "rm -rf ~/muse_jax && mkdir ~/muse_jax && tar -xzf ~/muse_jax.tar.gz -C ~/muse_jax &&\
 rm ~/muse_jax.tar.gz && $WORKER_SCRIPT install $(printf %q "$PYTHON_VERSION")" || status=$?
  [ "$DRY_RUN" = 1 ] || rm -rf "$folder"
  return "$status"
}

stop_training() {
  on_workers "$WORKER_SCRIPT stop"
}

# With the data mounted first, each time: a restart of the machine takes the mount away.
start_training() {
  local words mount=
  [ -z "$DATA_BUCKET" ] || mount="$WORKER_SCRIPT mount $DATA_BUCKET && "
  words=$(printf '%q ' --config="$CONFIG" --workdir="$WORKDIR" "${TRAIN_ARGS[@]+"${TRAIN_ARGS[@]}"}")
  on_workers "$mount$WORKER_SCRIPT start ${words% }"
}
