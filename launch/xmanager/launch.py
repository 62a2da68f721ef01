"""Runs a training through XManager: python launch/xmanager/launch.py --executor=WHERE --config=... --workdir=...

  local       this machine: the Python that runs this script, or with --image a container of that image
  kubernetes  one pod with GPUs in a Kubernetes cluster
  vertex      one machine with GPUs on Vertex AI
  jobset      TPU slices on GKE, as launch/gke/settings.toml says: XManager starts launch/gke/jobset.py

TPU slices go through `jobset` since XManager's own executors cannot ask for them: the Kubernetes one sets neither the
TPU resource nor a topology, and the Vertex one knows TPU v2 and v3 only.

--dry_run prints what would be launched, and launches nothing.
"""

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from xmanager import xm, xm_local

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXECUTORS = ("local", "kubernetes", "vertex", "jobset")

_EXECUTOR = flags.DEFINE_enum("executor", "local", EXECUTORS, "Where the training runs.")
_CONFIG = flags.DEFINE_string("config", None, "A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds all that the run writes.")
_TRAIN_ARG = flags.DEFINE_multi_string("train_arg", [], "One more flag of muse_jax.train; may be given several times.")
_IMAGE = flags.DEFINE_string("image", None, "Image of the training, from launch/gke/Dockerfile.")
_GPU = flags.DEFINE_string("gpu", None, "GPUs of kubernetes and vertex, as XManager names them: a100=8.")
_SETTINGS = flags.DEFINE_string("settings", str(ROOT / "launch/gke/settings.toml"), "Settings file of jobset.")
_TITLE = flags.DEFINE_string("title", "muse_jax", "Title of the experiment.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be launched, and launch nothing.")


def train_args() -> list[str]:
    """The flags of muse_jax.train.

    Raises:
      UsageError: if config or workdir is missing, or a run elsewhere would write to its own disk.
    """
    for name, flag in [("config", _CONFIG), ("workdir", _WORKDIR)]:
        if not flag.value:
            raise app.UsageError(f"--{name} must be given with --executor={_EXECUTOR.value}")
    if _EXECUTOR.value in ("kubernetes", "vertex") and not _WORKDIR.value.startswith("gs://"):
        raise app.UsageError(
            f"--workdir={_WORKDIR.value} must be in a bucket (gs://...) with --executor={_EXECUTOR.value}: the disk of "
            "the machine is lost when the job ends"
        )
    return [f"--config={_CONFIG.value}", f"--workdir={_WORKDIR.value}", *_TRAIN_ARG.value]


def requirements() -> xm.JobRequirements:
    """What --gpu asks for.

    Raises:
      UsageError: if it is not NAME=COUNT, or XManager knows no such GPU.
    """
    if not _GPU.value:
        return xm.JobRequirements()
    name, _, count = _GPU.value.partition("=")
    known = sorted(kind.name.lower() for kind in xm.GpuType)
    if name.lower() not in known or not count.isdecimal() or not int(count):
        raise app.UsageError(f"--gpu={_GPU.value} must be NAME=COUNT, as in a100=8, with a NAME of {', '.join(known)}")
    return xm.JobRequirements({xm.ResourceType[name]: int(count)})


def make_executor() -> xm.Executor:
    """Where the job runs, as XManager has it.

    Raises:
      UsageError: if --gpu is given where it means nothing, or is wrong.
    """
    if _EXECUTOR.value == "kubernetes":
        return xm_local.Kubernetes(requirements=requirements())
    if _EXECUTOR.value == "vertex":
        return xm_local.Vertex(requirements=requirements())
    if _GPU.value:
        raise app.UsageError(f"--gpu={_GPU.value} is for kubernetes and vertex; leave it out with {_EXECUTOR.value}")
    return xm_local.Local()


def make_packageable(executor: xm.Executor) -> xm.Packageable:
    """What runs there, and with which arguments.

    Raises:
      UsageError: if a flag is missing or misses.
    """
    if _EXECUTOR.value == "jobset":
        _check_settings_alone()
        if not pathlib.Path(_SETTINGS.value).is_file():
            raise app.UsageError(f"--settings={_SETTINGS.value} is no file; copy launch/gke/settings.toml")
        return _python(executor, [str(ROOT / "launch/gke/jobset.py"), "apply", f"--settings={_SETTINGS.value}"])
    if _EXECUTOR.value == "local" and not _IMAGE.value:
        return _python(executor, ["-m", "muse_jax.train", *train_args()])
    if not _IMAGE.value:
        raise app.UsageError(
            f"--image must be given with --executor={_EXECUTOR.value}; `python launch/gke/jobset.py image` builds one"
        )
    # the image has no entry point, so its command is given whole
    args = ["python", "-m", "muse_jax.train", *train_args()]
    return xm.container(executor.Spec(), image_path=_IMAGE.value, args=args)


def _check_settings_alone() -> None:
    """Raises UsageError for a flag that the settings file of jobset stands in for."""
    for name, flag in [("config", _CONFIG), ("workdir", _WORKDIR), ("train_arg", _TRAIN_ARG), ("image", _IMAGE)]:
        if flag.value:
            raise app.UsageError(
                f"--{name} is not for jobset, whose --settings={_SETTINGS.value} says it; leave the flag out"
            )


def _python(executor: xm.Executor, args: list[str]) -> xm.Packageable:
    """This very Python with arguments, finding this checkout whatever is installed."""
    return xm.binary(executor.Spec(), path=sys.executable, args=args, env_vars={"PYTHONPATH": str(ROOT)})


def describe(executor: xm.Executor, packageable: xm.Packageable) -> str:
    """The job in words: where, what, and the command line."""
    spec = packageable.executable_spec
    what = getattr(spec, "image_path", None) or spec.path
    args = packageable.args.to_list(shlex.quote)
    return f"{type(executor).__name__}: {executor.requirements!r}\n{what} {' '.join(args)}"


def show_jobset() -> None:
    """Prints what jobset.py would do.

    Raises:
      UsageError: if it refuses the settings file.
    """
    command = [sys.executable, ROOT / "launch/gke/jobset.py", "apply", f"--settings={_SETTINGS.value}", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise app.UsageError(done.stderr.strip())
    print(done.stdout, end="")


def launch(executor: xm.Executor, packageable: xm.Packageable) -> None:
    """Packages and adds the one job; waits for it where it is local.

    Raises:
      RuntimeError: if a local job ends with an error.
    """
    with xm_local.create_experiment(experiment_title=_TITLE.value) as experiment:
        [executable] = experiment.package([packageable])
        experiment.add(xm.Job(executable=executable, executor=executor))


def main(argv: Sequence[str]) -> Any:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    executor = make_executor()
    packageable = make_packageable(executor)
    if _DRY_RUN.value:
        print(describe(executor, packageable))
        if _EXECUTOR.value == "jobset":
            show_jobset()
        return
    launch(executor, packageable)


if __name__ == "__main__":
    app.run(main)
