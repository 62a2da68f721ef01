"""The conversion's Beam pipeline, here and in processes that die."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from PIL import Image

from muse_jax import convert, data
from muse_jax.specs import DataSpec

pytest.importorskip("apache_beam", reason="pip install 'muse_jax[convert]'")

TARS, SAMPLES = 4, 6


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tars")
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number * SAMPLES, (number + 1) * SAMPLES):
                file = io.BytesIO()
                Image.new("RGB", (24, 24), (index, 0, 0)).save(file, "PNG")
                for ending, content in (("png", file.getvalue()), ("txt", f"picture {index}".encode())):
                    info = tarfile.TarInfo(f"{index:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def arguments(tars, out, *more):
    return ["--from=webdataset", f"--path={tars}", f"--out={out}", "--eval_share=0", *more]


def captions(out):
    spec = DataSpec(name="array_record", image_size=16, path=str(out))
    return sorted(data.make_source(spec).captions(), key=lambda caption: int(caption.split()[1]))


EXPECTED = [f"picture {index}" for index in range(TARS * SAMPLES)]


def test_a_pipeline_in_this_process(tars, tmp_path, capsys):
    assert convert.main(arguments(tars, tmp_path / "out", "--workers=1")) == 0
    assert f"train: {TARS * SAMPLES} pictures in {TARS} shards" in capsys.readouterr().out
    assert captions(tmp_path / "out") == EXPECTED
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.array_record")}
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/parts/00002.json").unlink()
    assert convert.main(arguments(tars, tmp_path / "out", "--workers=1")) == 0
    changed = [path.name for path, then in parts.items() if path.stat().st_mtime_ns != then]
    assert changed == [f"train-00002-of-{TARS:05d}.array_record"]
    assert captions(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--min_sid=3"], ["--min_sid is no flag", "--min_side"]),
        (["--dataset=coco"], ["--dataset means nothing to --from=webdataset"]),
        (["--eval_share=1.5"], ["--eval_share is 1.5"]),
        (["--max_aspect=0.5"], ["--max_aspect is 0.5"]),
        (["--path=/nowhere"], ["--path '/nowhere' names no tars"]),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_begun(tars, tmp_path, capsys, more, words):
    assert convert.main(arguments(tars, tmp_path / "out", *more)) == 1
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not list(tmp_path.rglob("plan.json"))


@pytest.mark.slow
def test_processes_killed_on_the_way_go_on(tars, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "muse_jax.convert", *arguments(tars, out, "--workers=2")]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("parts/*.json")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert captions(out) == EXPECTED
    assert not list(out.glob(".draft-*"))
    assert json.loads((out / "manifest.json").read_text())["samples"] == TARS * SAMPLES
