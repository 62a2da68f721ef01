"""The command as two processes start it, and what it says where they don't fit together."""

import io
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from muse_jax import train
from muse_jax.training import logs
from muse_jax.training.checkpoint import load_stage

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = re.search(r"^for i in 0 1; do (python .*) & done; wait$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]


def start(index, port, *more):
    """Starts the README's command as process `index`, on the tiny variant."""
    command = COMMAND.replace("base.py", "base.py:tiny").replace("8476", str(port)).replace("$i", str(index))
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    words = [sys.executable, *shlex.split(command)[1:], *more]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(processes):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes")
def test_two_processes_of_the_readme_train_as_one_does(tmp_path):
    """Text, a frozen tokenizer, evaluation and previews included."""
    changes = [
        "--config.model.codebook_size=512",
        "--config.train.steps=4",
        "--config.train.log_every=1",
        "--config.checkpoint.every_steps=2",
    ]
    port = free_port()
    ended = finish([start(i, port, *changes, f"--workdir={tmp_path}/two") for i in range(2)])
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"{tmp_path}/two finished: step 4" in ended[0][1]
    one = [word for word in COMMAND.replace("base.py", "base.py:tiny").split()[1:] if "proc" not in word]
    one = [word for word in one if "coordinator" not in word]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    words = [sys.executable, *one, *changes, f"--workdir={tmp_path}/one"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    lines = [logs.read_metrics(tmp_path / name) for name in ("two", "one")]
    losses = [[line["loss"] for line in one if "loss" in line] for one in lines]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-4)
    params = [load_stage(tmp_path / name).params for name in ("two", "one")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *params)
    names = [sorted(path.name for path in (tmp_path / name / "samples").iterdir()) for name in ("two", "one")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_processes_with_other_configs_are_told_which_keys_differ(tmp_path):
    port = free_port()
    changes = [f"--workdir={tmp_path}", "--config.model.codebook_size=512", "--config.train.steps=4"]
    ended = finish([start(i, port, *changes, f"--config.seed={i}") for i in range(2)])
    assert [code for code, _ in ended] == [1, 1], ended
    assert all("the config is not that of process 0: seed" in output for _, output in ended)


@pytest.mark.slow
def test_one_that_cannot_open_the_data_ends_both_at_once(tmp_path):
    """Long before anything is trained, and before jax itself misses a process."""
    port = free_port()
    changes = [f"--workdir={tmp_path}", "--config.model.codebook_size=512", "--config.deadlines.heartbeat=300"]
    own = [[], ["--config.data.eval_split=nowhere"]]
    began = time.monotonic()
    ended = finish([start(i, port, *changes, *own[i]) for i in range(2)])
    assert time.monotonic() - began < 200
    assert [code for code, _ in ended] == [1, 1], ended
    assert "failed: DataError: data.eval_split is 'nowhere'" in ended[0][1]
    assert "Start all processes again" in ended[0][1]


def test_data_that_cannot_be_opened_in_time_end_the_run(tmp_path, one_device):
    program = (
        "import time; from muse_jax import ahead, data, specs, train\n"
        "def mounted_badly(*_): time.sleep(1000)\n"
        "config = ahead.read_config('configs/pictures/tokenizer_low.py:tiny')\n"
        "config.deadlines.start = 2.0\n"
        "data.make_source = mounted_badly\n"
        f"train.train(specs.from_config(config), {str(tmp_path / 'w')!r})"
    )
    settings = {"capture_output": True, "text": True, "timeout": 60, "check": False}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=one_device, **settings)
    assert done.returncode == 124, done.stderr
    assert "'start' at step 0 has taken" in done.stderr
    assert "mounted_badly" in done.stderr


@pytest.mark.parametrize("command", ["train", "compile"])
def test_a_misspelt_key_is_said_in_one_line(command, tmp_path, one_device):
    words = [sys.executable, "-m", f"muse_jax.{command}", "--config=configs/scenes/base.py"]
    words += ["--config.train.stepz=3", *([f"--workdir={tmp_path}/w"] if command == "train" else [])]
    settings = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run(words, cwd=ROOT, env=one_device, **settings)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "--config.train.stepz=3" in line
    assert '"steps"' in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config=configs/nope.py"], "there is no config configs/nope.py"),
        (["--config", "configs/nope.py:tiny"], "there is no config configs/nope.py"),
        ([f"--config={ROOT / 'README.md'}"], ".*README.md is no config; name a .py file"),
        ([f"--config={ROOT / 'configs'}"], "there is no config .*configs"),
        ([f"--config={ROOT / 'configs/base_632m.py'}:nope"], "this config has no variants; leave out 'nope'"),
        ([f"--config={ROOT / 'configs/base_3b.py'}:nope"], "unknown variant 'nope'; expected '' or 'precomputed'"),
    ],
)
def test_what_is_no_config_is_said_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse_flags(["train", "--workdir=w", *words])
    assert ended.value.code == 1
    assert re.fullmatch(f"--config: {said}.*\n", capsys.readouterr().err)


def test_what_a_config_file_raises_is_not_taken_for_a_misspelt_key(tmp_path, one_device):
    (tmp_path / "own.py").write_text("def get_config():\n    return {}['stepz']\n")
    words = [sys.executable, "-m", "muse_jax.train", f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/w"]
    settings = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run([*words, "--config.data.path=x"], cwd=ROOT, env=one_device, **settings)
    assert done.returncode == 1
    assert "own.py" in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.name=array_record", "data.path=nowhere"], "data.path is 'nowhere'"),
        (["data.name=folder", "data.path=nowhere"], "data.path is 'nowhere'"),
        (["data.name=scenes", "data.text_length=8", "data.vocabulary=nowhere.model"], "nowhere.model"),
        (["data.name=scenes", "data.eval_split=nowhere"], "data.eval_split is 'nowhere'"),
    ],
)
def test_wrong_data_are_said_in_one_message(changes, words, tmp_path, one_device):
    command = [sys.executable, "-m", "muse_jax.train", "--config=configs/pictures/tokenizer_low.py:tiny"]
    command += [f"--workdir={tmp_path}/w", *(f"--config.{change}" for change in changes)]
    settings = {"capture_output": True, "text": True, "timeout": 200, "check": False}
    done = subprocess.run(command, cwd=ROOT, env=one_device, **settings)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]  # before it XLA may speak of what it finds in the compilation cache
    assert said.startswith("DataError: ")
    assert words in said
    assert not (tmp_path / "w/config.json").exists()


def test_pictures_that_are_all_broken_are_said_in_one_message(tmp_path, one_device):
    (tmp_path / "pictures").mkdir()
    for index in range(12):
        whole = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(whole, format="JPEG")
        (tmp_path / f"pictures/{index}.jpg").write_bytes(whole.getvalue()[: whole.tell() // 2])
    command = [sys.executable, "-m", "muse_jax.train", "--config=configs/pictures/tokenizer_low.py:tiny"]
    command += [f"--workdir={tmp_path}/w", f"--config.data.path={tmp_path}/pictures"]
    settings = {"capture_output": True, "text": True, "timeout": 200, "check": False}
    done = subprocess.run(command, cwd=ROOT, env=one_device, **settings)
    assert done.returncode == 1
    assert "are broken; mend them" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
