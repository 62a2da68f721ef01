"""A real masked model and a real VQGAN, killed at any moment, end with the bits of a run never killed."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from muse_jax.training import checkpoint

STEPS = 14


def start(root, stage, workdir, *extra):
    command = [
        *(sys.executable, "-m", "muse_jax.train", f"--config=configs/scenes/{stage}.py:tiny", f"--workdir={workdir}"),
        *(f"--config.train.steps={STEPS}", "--config.checkpoint.every_steps=3", *extra),
    ]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, error = process.communicate(timeout=400)
    assert process.returncode == 0, error[-3000:]


def leaves(params, prefix=""):
    for name, value in sorted(params.items()):
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def assert_same_bits(one, other):
    for (name, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert a.tobytes() == b.tobytes(), name


def kill_when(process, workdir: pathlib.Path, step: int):
    """SIGKILL somewhere after checkpoint `step` is begun."""
    folder = workdir / "checkpoints"
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if folder.is_dir() and any(name.startswith(str(step)) for name in os.listdir(folder)):
            time.sleep(random.Random(step).uniform(0, 0.3))
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer_low", "base"])
def test_killed_and_started_again_it_ends_with_the_same_bits(stage, root, tmp_path):
    extra = []
    if stage == "base":
        finish(start(root, "tokenizer_low", tmp_path / "tokenizer"))
        extra = [f"--config.task.tokenizer={tmp_path / 'tokenizer'}"]
    finish(start(root, stage, tmp_path / "never", *extra))
    for step in (3, 9):
        kill_when(start(root, stage, tmp_path / "killed", *extra), tmp_path / "killed", step)
    finish(start(root, stage, tmp_path / "killed", *extra))
    never, killed = (checkpoint.load_stage(tmp_path / name) for name in ("never", "killed"))
    assert never.step == killed.step == STEPS
    assert_same_bits(never.params, killed.params)


@pytest.mark.slow
def test_fine_tuning_leaves_encoder_and_codebook_bit_for_bit(root, tmp_path):
    finish(start(root, "tokenizer_high", tmp_path / "tokenizer"))
    finish(start(root, "decoder", tmp_path / "decoder", f"--config.task.init_from={tmp_path / 'tokenizer'}"))
    before, after = (checkpoint.load_stage(tmp_path / name).params for name in ("tokenizer", "decoder"))
    for name in ("encoder", "quantizer"):
        assert_same_bits(before[name], after[name])
