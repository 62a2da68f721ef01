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
from muse_jax.data import inputs
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
        (["--workers=1", "surplus"], ["unexpected argument 'surplus'"]),
        (["--eval_share=1.5"], ["--eval_share is 1.5"]),
        (["--max_aspect=0.5"], ["--max_aspect is 0.5"]),
        (["--max_aspect=nan"], ["--max_aspect is nan"]),
        (["--min_side=-5"], ["--min_side is -5"]),
        (["--workers=-1"], ["--workers is -1"]),
        (["--out="], ["--out is empty"]),
        (["--path=/nowhere"], ["--path '/nowhere' names no tars"]),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_begun(tars, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    assert convert.main(arguments(tars, tmp_path / "out", *more)) == 1
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not list(tmp_path.rglob("plan.json"))


def test_another_programs_folder_is_refused_and_left_as_it_is(tars, tmp_path, capsys):
    mine = tmp_path / "out/train-00000-of-00002.array_record"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert convert.main(arguments(tars, tmp_path / "out", "--workers=1")) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == [mine]
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device\n"),
        (inputs.InputError("it changed"), "InputError: it changed\n"),
    ],
)
def test_an_error_within_the_pipeline_is_said_in_one_line(tars, tmp_path, capsys, monkeypatch, error, said):
    def failing(source, piece):
        raise error
        yield

    monkeypatch.setattr(inputs.WebDataset, "samples", failing)
    assert convert.main(arguments(tars, tmp_path / "out", "--workers=1")) == 1
    assert capsys.readouterr().err.splitlines(keepends=True)[-1] == said


def test_an_error_of_a_worker_process_is_its_last_line():
    traceback = "Traceback (most recent call last):\n  raise\nmuse_jax.data.inputs.InputError: it changed"
    within = "During handling of the above exception, another exception occurred:"
    error = RuntimeError(f"{traceback}\n\n{within}\n\n{traceback} [while running 'Map(<lambda at convert.py:75>)']\n")
    assert convert._message(error) == "InputError: it changed"


def test_a_worker_process_that_was_killed_is_said_to_have_ended():
    said = convert._message(RuntimeError("Channel closed prematurely."))
    assert said.startswith("A worker process ended (killed, perhaps for memory); start again to go on")
    assert "--workers" in said


def test_an_empty_split_for_evaluation_is_said(tars, tmp_path, capsys):
    flags = ["--eval_share=1e-9", "--workers=1"]
    assert convert.main(arguments(tars, tmp_path / "out", *flags)) == 0
    said = capsys.readouterr().err
    assert "No picture went to the split test" in said
    assert "config.data.eval_split=train" in said
    spec = DataSpec(name="array_record", image_size=16, path=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no split 'test', but 'train'\. Set data\.eval_split .* larger --eval_share"):
        data.make_source(spec, "eval")


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
