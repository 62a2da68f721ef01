"""The command."""

import subprocess
import sys
import time

import pytest
from small import our_params, write_t5x

from muse_jax.import_weights import import_weights, listing
from muse_jax.interop import folder, registry
from muse_jax.interop.tensors import WeightsError


def run(*arguments):
    command = [sys.executable, "-m", "muse_jax.import_weights", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_format_is_listed_with_where_size_and_licence():
    text = listing()
    for name, known in registry.FORMATS.items():
        assert f"--from={name}" in text
        assert known.published
        for one in known.published:
            assert one.where in text
            assert one.size in text
            assert one.licence in text


def test_the_command_writes_a_folder_and_refuses_in_one_message(tmp_path):
    write_t5x(tmp_path / "t5x", our_params())
    arguments = ["--from=t5x", f"--path={tmp_path}/t5x", f"--out={tmp_path}/out", "--dtype=bfloat16"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"--config.model.text.weights={tmp_path}/out" in done.stdout
    assert "--config.model.text.layers=3" in done.stdout
    assert folder.read_manifest(tmp_path / "out")["origin"]["from"] == "t5x"
    (tmp_path / "t5x" / "target.encoder.encoder_norm.scale" / "0").unlink()
    done = run(*arguments[:2], f"--out={tmp_path}/two")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "WeightsError" in done.stderr
    assert "target.encoder.encoder_norm.scale lacks the chunk 0" in done.stderr
    assert not (tmp_path / "two").exists()


SLOW_IMPORT = """
import pathlib, runpy, sys, time
from muse_jax.interop import folder

begun = pathlib.Path(sys.argv.pop())

def slow(*_):
    begun.touch()
    time.sleep(60)

folder._write_leaf = slow
runpy.run_module("muse_jax.import_weights", run_name="__main__")
"""


def test_an_import_that_is_told_to_end_leaves_nothing(tmp_path):
    write_t5x(tmp_path / "t5x", our_params())
    arguments = ["--from=t5x", f"--path={tmp_path}/t5x", f"--out={tmp_path}/out", str(tmp_path / "at-work")]
    process = subprocess.Popen([sys.executable, "-c", SLOW_IMPORT, *arguments])
    while not (tmp_path / "at-work").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.*.draft"))
    process.terminate()
    assert process.wait(30) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-work", "t5x"]


def test_a_bucket_that_cannot_be_read_is_one_message(tmp_path):
    done = run("--from=t5x", "--path=gs://muse-jax-has-no-such-bucket/checkpoint", f"--out={tmp_path}/out")
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_formats_are_named():
    with pytest.raises(WeightsError, match="'gguf' is no format; expected t5_hf, t5x, lpips"):
        import_weights("gguf", "x", "y")
    with pytest.raises(WeightsError, match="'int8'; expected source, float32, bfloat16"):
        import_weights("t5x", "x", "y", "int8")
