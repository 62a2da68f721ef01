"""launch/xmanager/launch.py: its local path is run, of the others what it would launch is read."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "launch" / "xmanager" / "launch.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xmanager") is None,
    reason="xmanager is not installed; pip install -e '.[launch]' brings it",
)
# A stand-in of muse_jax.train, found before the real one: it says what it got.
TRAIN = """
import os, pathlib, sys
pathlib.Path(os.environ["SAID"]).write_text("\\n".join(sys.argv[1:]))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def launch(tmp_path):
    """Runs the script in a home of its own, where XManager keeps its list of experiments."""

    def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(tmp_path), "SAID": str(tmp_path / "said"), **environment}
        command = [sys.executable, str(SCRIPT), *flags]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
        )

    return run


@pytest.fixture
def stand_in(tmp_path):
    """A python whose muse_jax.train only says what it got; the script starts the Python that runs it."""
    (tmp_path / "muse_jax").mkdir()
    (tmp_path / "muse_jax" / "__init__.py").write_text("")
    (tmp_path / "muse_jax" / "train.py").write_text(TRAIN)


ARGUMENTS = ["--config=configs/scenes/base.py", "--workdir=runs/a b", "--train_arg=--config.train.steps=3"]
GIVEN = ["--config=configs/scenes/base.py", "--workdir=runs/a b", "--config.train.steps=3"]


def test_the_local_path_runs_the_training(launch, stand_in, tmp_path):
    done = launch(*ARGUMENTS)  # `python -m` looks in the working directory first
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text().splitlines() == GIVEN
    assert list(tmp_path.rglob("*.sqlite3")), "the experiment is not in XManager's list"


def test_a_failed_training_fails_the_launch(launch, stand_in):
    done = launch(*ARGUMENTS, CODE="3")
    assert done.returncode != 0
    assert "returned non-zero code: 3" in done.stderr


# Importing XManager takes seconds, so that all cases share one process.
DRIVER = """
import importlib.util, io, contextlib, json, sys
from absl import flags
from absl.testing import flagsaver
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
results = []
for case in json.load(sys.stdin):
    printed = io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(printed):
        flags.FLAGS(["script", *case, "--dry_run"])
        try:
            script.main(["script"])
        except script.app.UsageError as error:
            print(f"UsageError: {error}")
    results.append(printed.getvalue())
print(json.dumps(results))
"""
BUCKET = [ARGUMENTS[0], "--workdir=gs://bucket/run"]
CASES = [
    (ARGUMENTS, ["Local", "-m muse_jax.train", "'--workdir=runs/a b'"]),
    ([*ARGUMENTS, "--image=r/i:1"], ["Local", "r/i:1 python -m muse_jax.train"]),
    ([*BUCKET, "--executor=kubernetes", "--image=r/i:1", "--gpu=a100=8"], ["Kubernetes", "a100=8", "r/i:1 python -m"]),
    ([*BUCKET, "--executor=vertex", "--image=r/i:1", "--gpu=h100=1"], ["Vertex", "h100=1", "gs://bucket/run"]),
    (
        ["--executor=jobset", "--settings=mine.toml"],
        ["Local", "launch/gke/jobset.py apply --settings=mine.toml", "kind: JobSet"],
    ),
    (["--executor=jobset"], ["UsageError: SettingsError: ", "put your own value in its place"]),
    *(
        (["--executor=jobset", "--settings=mine.toml", flag], [f"UsageError: {flag.split('=')[0]} is not for jobset"])
        for flag in (*ARGUMENTS, "--image=r/i:1")
    ),
    (["--executor=jobset", "--settings=none.toml"], ["UsageError: --settings=none.toml is no file"]),
    ([*ARGUMENTS, "--gpu=a100=8"], ["UsageError: --gpu=a100=8 is for kubernetes and vertex"]),
    (["--workdir=w"], ["UsageError: --config must be given"]),
    ([*ARGUMENTS, "--executor=vertex", "--image=i"], ["UsageError", "must be in a bucket"]),
    ([*BUCKET, "--executor=kubernetes"], ["UsageError: --image must be given"]),
    ([*BUCKET, "--executor=vertex", "--gpu=tpu_v4=8"], ["UsageError: --gpu=tpu_v4=8 must be NAME=COUNT"]),
]


def test_dry_run_says_what_it_would_launch_or_what_is_wrong_and_launches_nothing(stand_in, tmp_path):
    shipped = (ROOT / "launch" / "gke" / "settings.toml").read_text()
    (tmp_path / "mine.toml").write_text(shipped.replace("YOUR_", "my-").lower())
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(SCRIPT)],
        input=json.dumps([case for case, _ in CASES]),
        env={**os.environ, "HOME": str(tmp_path), "SAID": str(tmp_path / "said")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (case, said), printed in zip(CASES, results, strict=True):
        for words in said:
            assert words in printed, (case, printed)
    assert not (tmp_path / "said").exists()
    assert not list(tmp_path.rglob("*.sqlite3"))
