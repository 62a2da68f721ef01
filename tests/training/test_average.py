"""The paper's offline EMA over checkpoints."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import toys
from etils import epath

from muse_jax import average
from muse_jax.training.checkpoint import StageError, load_stage


def test_average_of_kept_checkpoints(tmp_path):
    """0.7 old + 0.3 new, oldest first; a damaged checkpoint is left out; frozen values stay bit for bit."""
    run = toys.spec(**{"checkpoint.keep": 3, "checkpoint.every_steps": 2})
    toys.train(run, tmp_path, vocabulary={"kind": "words"})
    seen = []
    for step in (4, 6, 8):
        params, used = average.average(tmp_path, 0.0)
        assert used[-1] == 8
        item = average.reading.read_meta(epath.Path(tmp_path) / f"checkpoints/{step}")["leaves"]["params"]
        seen.append(average.reading.read_numpy(epath.Path(tmp_path) / f"checkpoints/{step}", "params", item))
    averaged, used = average.average(tmp_path, 0.7)
    assert used == [4, 6, 8]
    for name, leaf in averaged.items():
        expected = 0.7 * (0.7 * seen[0][name] + 0.3 * seen[1][name]) + 0.3 * seen[2][name]
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    assert averaged["unused"].tobytes() == seen[0]["unused"].tobytes()
    (tmp_path / "checkpoints/6/params/_METADATA").unlink()
    assert average.average(tmp_path, 0.7)[1] == [4, 8]
    with pytest.raises(ValueError, match="--decay"):
        average.average(tmp_path, 1.0)
    with pytest.raises(StageError):
        average.average(tmp_path / "nowhere")


def test_the_command_writes_a_stage(tmp_path):
    run = toys.spec()
    toys.train(run, tmp_path, vocabulary={"kind": "words"})
    command = [sys.executable, "-m", "muse_jax.average", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    stage = load_stage(tmp_path / "averaged")
    assert (stage.spec, stage.vocabulary, stage.step) == (run, {"kind": "words"}, 8)
    expected, _ = average.average(tmp_path, 0.7)
    assert toys.bits(stage.params) == toys.bits(average.trees.nest(expected))
    assert jax.tree.structure(stage.params) == jax.tree.structure(load_stage(tmp_path).params)
    done = subprocess.run([*command, "--decay=2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--decay is 2.0" in done.stderr
    done = subprocess.run([*command, f"--out={tmp_path}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "name a new folder" in done.stderr
    assert (tmp_path / "checkpoints").exists()
    done = subprocess.run([*command, f"--out={tmp_path / 'config.json' / 'new'}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "config.json is a file; name another folder" in done.stderr
    assert "Traceback" not in done.stderr
