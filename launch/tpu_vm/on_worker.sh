#!/usr/bin/env bash
# Runs on a worker of the slice; the other scripts call it over ssh.
#
#   on_worker.sh install VERSION   a virtual environment of that Python with the package in ~/muse_jax
#   on_worker.sh mount BUCKET      the bucket at /mnt/muse_data, read-only, by Cloud Storage FUSE
#   on_worker.sh start FLAGS...    python -m muse_jax.train FLAGS..., in a session of its own: it outlives the connection
#   on_worker.sh status            "training: running", "training: exited CODE", "training: lost" or "training: none"
#   on_worker.sh stop              SIGTERM, and waits until the run has saved and ended; SIGKILL if it never does
set -euo pipefail

REPOSITORY=$HOME/muse_jax
ENVIRONMENT=$HOME/muse_venv
RUN=$HOME/muse_run # pid, exit_code, train.log
DATA=/mnt/muse_data
STOP_SECONDS=${STOP_SECONDS:-600} # a run that has not saved and ended by then is stuck, and killed

install() {
  # The images of TPU VMs come with Python 3.10, which is too old; uv brings the one asked for.
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv
    export PATH="$HOME/.local/bin:$PATH"
  fi
  # Another version than last time gets another environment.
  if [ ! -x "$ENVIRONMENT/bin/python" ] || [ "$(cat "$ENVIRONMENT/asked_for" 2>/dev/null)" != "$1" ]; then
    uv venv --quiet --clear --python "$1" "$ENVIRONMENT"
    echo "$1" >"$ENVIRONMENT/asked_for"
  fi
  uv pip install --quiet --python "$ENVIRONMENT/bin/python" --editable "${REPOSITORY}[tpu]"
  echo "installed on $(hostname)"
}

mount() {
  local mounted
  if ! command -v gcsfuse >/dev/null; then
    local server=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl --fail --silent --show-error "$server/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $server gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq update
    sudo apt-get -qq install --yes -o DPkg::Lock::Timeout=600 gcsfuse # a new machine updates itself meanwhile
  fi
  mounted=$(findmnt --noheadings --output=SOURCE "$DATA" || true)
  # a gcsfuse that has died leaves a mount that can't be read
  if [ "$mounted" = "$1" ] && stat "$DATA" >/dev/null 2>&1; then return; fi
  [ -z "$mounted" ] || fusermount -u "$DATA"
  sudo mkdir -p "$DATA"
  sudo chown "$(id -u)" "$DATA"
  # implicit-dirs: folders of which a bucket knows only that files' names begin with them
  gcsfuse --implicit-dirs -o ro "$1" "$DATA"
}

# Whether the process of the pid file lives and is ours: after a reboot another may have its number.
running() {
  [ -f "$RUN/pid" ] && [ ! -f "$RUN/exit_code" ] &&
    tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$RUN/pid")/cmdline" | grep -q muse_jax.train
}

status() {
  if [ ! -f "$RUN/pid" ]; then
    echo "training: none"
  elif [ -f "$RUN/exit_code" ]; then
    echo "training: exited $(cat "$RUN/exit_code")"
  elif running; then
    echo "training: running"
  else
    echo "training: lost" # ended without a word: out of memory, or the machine was restarted
  fi
}

start() {
  if [ ! -x "$ENVIRONMENT/bin/python" ]; then
    echo "muse_jax is not installed on $(hostname); install it first: install.sh" >&2
    exit 1
  fi
  mkdir -p "$RUN"
  exec 9>"$RUN/lock" # of two starts at once, the second waits, and then finds the first one's training
  flock 9
  if running; then
    echo "training runs already on $(hostname), process $(cat "$RUN/pid"); stop it first: stop.sh" >&2
    exit 1
  fi
  rm -f "$RUN/pid" "$RUN/exit_code"
  cd "$REPOSITORY" # where configs/ is
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    run=$1; shift
    "$@" & echo $! >"$run/pid.new" && mv "$run/pid.new" "$run/pid"
    wait $! && code=0 || code=$?
    echo "$code" >"$run/exit_code.new" && mv "$run/exit_code.new" "$run/exit_code"
  ' launcher "$RUN" "$ENVIRONMENT/bin/python" -m muse_jax.train "$@" >>"$RUN/train.log" 2>&1 </dev/null 9>&- &
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    [ ! -f "$RUN/pid" ] || break
    sleep 0.1
  done
  if [ ! -f "$RUN/pid" ]; then
    echo "training did not start on $(hostname): $RUN/train.log" >&2
    exit 1
  fi
  echo "started on $(hostname), process $(cat "$RUN/pid")"
}

stop() {
  if ! running; then
    status
    return
  fi
  local deadline=$((SECONDS + STOP_SECONDS)) tries
  kill -TERM "$(cat "$RUN/pid")"
  while running; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      echo "training on $(hostname) did not end within $STOP_SECONDS s of SIGTERM; killing it" >&2
      kill -KILL "$(cat "$RUN/pid")"
    fi
    sleep 0.5
  done
  # the exit code is written a moment after the process is gone
  for ((tries = 0; tries < 20; tries++)); do
    [ ! -f "$RUN/exit_code" ] || break
    sleep 0.1
  done
  status
}

case ${1:-} in
  install | mount | start | status | stop) "$@" ;;
  *)
    echo "on_worker.sh: '${1:-}' is none of install, mount, start, status, stop" >&2
    exit 1
    ;;
esac
