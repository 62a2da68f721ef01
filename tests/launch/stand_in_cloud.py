"""A stand-in for Google Cloud: a `gcloud` that records its arguments, keeps one slice, and runs ssh commands here.

A worker is a folder that is HOME for what ssh runs. Its `uv` makes a `python` that stands for the training: it counts
its steps in the "bucket" and ends as the test has planned. So the scripts run as they are, on both sides of ssh.
"""

import os
import pathlib
import subprocess
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "launch" / "tpu_vm"

# In bash, since every test starts several of each. A recorded word ends with \x1f, a call with \x1e.
GCLOUD = r"""
#!/usr/bin/env bash
set -eu
{ printf '%s\x1f' "$@"; printf '\x1e'; } >>"$CLOUD/calls"
group=$3 verb=$4
for word in "$@"; do
  case $word in --command=*) command=${word#*=} ;; esac
done
fail() {
  echo "$*" >&2
  exit 1
}
if [ "$verb" = create ]; then
  [ ! -f "$CLOUD/slice" ] || fail ALREADY_EXISTS
  rm -rf "$CLOUD/worker" && mkdir "$CLOUD/worker"
  echo ACTIVE >"$CLOUD/slice"
  exit
fi
[ -f "$CLOUD/slice" ] || fail "NOT_FOUND: Resource was not found"
if [[ $verb == s* && ${command-} != *status* && -s "$CLOUD/unprepared" ]]; then # a line less, nothing done
  sed -i 1d "$CLOUD/unprepared"
  echo "WARNING: Could not prepare all 1 nodes, attempting to ssh into the rest." >&2
  exit
fi
case $verb in
  delete) rm "$CLOUD/slice" ;;
  describe)
    if [ "$group" = tpu-vm ]; then
      if [ -f "$CLOUD/node_state" ]; then cat "$CLOUD/node_state"; else echo READY; fi
    elif [ -s "$CLOUD/states" ]; then # what the next questions for a state are answered; then the truth
      mapfile -t states <"$CLOUD/states"
      printf '%s\n' "${states[@]:1}" | sed '/^$/d' >"$CLOUD/states"
      [ "${states[0]}" != BROKEN ] || fail "TransportError: 503 from the proxy, host not found; try again"
      echo "${states[0]}"
    else
      cat "$CLOUD/slice"
    fi
    ;;
  scp) cp "$5" "$CLOUD/worker/${6#*:}" ;;
  ssh)
    if [ -s "$CLOUD/silent" ] && [[ $command == *status* ]]; then # one line less a look that one worker doesn't answer
      sed -i 1d "$CLOUD/silent"
      HOME=$CLOUD/worker bash -c "$command"
      fail "ssh: connect to host: No route to host"
    fi
    if [ -s "$CLOUD/refused" ] && [[ $command != *status* ]]; then # one line less a refused connection
      sed -i 1d "$CLOUD/refused"
      fail "connect timed out"
    fi
    HOME=$CLOUD/worker exec bash -c "$command"
    ;;
esac
"""

# uv venv ... FOLDER makes the training's python; uv pip install is only recorded.
UV = r"""
#!/usr/bin/env bash
set -eu
echo "uv $*" >>"$CLOUD/uv.log"
if [ "$1" = venv ]; then
  rm -rf "${!#}" && mkdir -p "${!#}/bin"
  cp "$CLOUD/training" "${!#}/bin/python"
fi
"""

# What mounting a bucket asks the machine for is recorded; `mounted` is what findmnt then finds.
FUSE = r"""
#!/usr/bin/env bash
set -eu
name=${0##*/}
[ "$name" = findmnt ] || echo "$name $*" >>"$CLOUD/fuse.log"
case $name in
  findmnt) cat "$CLOUD/mounted" 2>/dev/null ;;
  fusermount) rm "$CLOUD/mounted" ;;
  gcsfuse) echo "${*: -2:1}" >"$CLOUD/mounted" ;;
  stat) [ ! -f "$CLOUD/dead" ] || exit 1 ;;
  sudo) if [ "$1" = tee ]; then cat >/dev/null; elif [[ $* == *install* ]]; then cp "$0" "$CLOUD/bin/gcsfuse"; fi ;;
esac
"""

# So that following a log ends.
TAIL = r"""
#!/usr/bin/env bash
[ "$*" = "-n 100 -F $CLOUD/worker/muse_run/train.log" ] || exit 1
cat "${!#}"
"""

# Every start does three steps from where the bucket is, then ends as the next line of the plan says.
TRAINING = r"""
#!/usr/bin/env bash
trap 'exit 143' TERM
[ "$1 $2" = "-m muse_jax.train" ] || exit 2
start=0
[ ! -f "$CLOUD/bucket_steps" ] || start=$(<"$CLOUD/bucket_steps")
echo $((start + 3)) >"$CLOUD/bucket_steps"
echo "step $((start + 3))"
plan=()
[ ! -f "$CLOUD/plan" ] || mapfile -t plan <"$CLOUD/plan"
printf '%s\n' "${plan[@]:1}" >"$CLOUD/plan"
end=${plan[0]:-0}
echo "$start ${*:3}" >>"$CLOUD/starts"
case $end in
  preempt | stay)
    [ "$end" = stay ] || echo SUSPENDED >"$CLOUD/slice"
    for ((i = 0; i < 1000; i++)); do sleep 0.1; done
    ;;
  *) exit "$end" ;;
esac
"""

SETTINGS = """
PROJECT=my-project
ZONE=us-central2-b
NAME=muse
ACCELERATOR_TYPE=v4-16
SLICES=1
CAPACITY=spot
RUNTIME_VERSION=
CONFIG=configs/scenes/base.py
WORKDIR=gs://bucket/runs/muse
TRAIN_ARGS=('--config.train.steps=9' '--config.data.path=gs://a folder/it'"'"'s')
PYTHON_VERSION=3.12
POLL_SECONDS=0.05
MAX_CRASHES=2
"""


class Cloud:
    """The stand-in's folder, and the scripts of launch/tpu_vm run against it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.settings = folder / "settings.sh"
        self.settings.write_text(SETTINGS)
        binaries = folder / "bin"
        binaries.mkdir()
        for name, text in [("bin/gcloud", GCLOUD), ("bin/uv", UV), ("bin/tail", TAIL), ("training", TRAINING)]:
            (folder / name).write_text(text.lstrip())
            (folder / name).chmod(0o755)
        for name in ("findmnt", "fusermount", "stat", "sudo", "curl", "lsb_release"):
            (binaries / name).write_text(FUSE.lstrip())
            (binaries / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "CLOUD": str(folder),
            "TMPDIR": str(folder),
        }

    def run(self, script: str, *flags: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / script), f"--settings={self.settings}", *flags]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def set(self, **values: str) -> None:
        """Adds to the settings; the last word counts."""
        with self.settings.open("a") as file:
            file.write("".join(f"{name}={value}\n" for name, value in values.items()))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(textwrap.dedent(text).strip())

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def calls(self, verb: str | None = None) -> list[list[str]]:
        """What gcloud was called with, in order; those of one verb if it is given."""
        calls = [record.split("\x1f")[:-1] for record in self.read("calls").split("\x1e")[:-1]]
        return [call for call in calls if verb in (None, call[3])]

    def end(self) -> None:
        """Ends the training that a test has left behind."""
        pid = self.read("worker/muse_run/pid")
        if pid and pathlib.Path(f"/proc/{pid.strip()}").exists():
            os.kill(int(pid), 9)
