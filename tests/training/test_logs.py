"""Metrics, pictures and curves, and writers that fail."""

import errno
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import toys
from PIL import Image

from muse_jax.training import logs


def test_metrics_survive_a_kill_and_are_written_once(tmp_path):
    """Lines after the step that a run goes on from are dropped, and so is one cut short."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"step": 4, "finished": true}\n{"step": 6, "lo'
    )
    log = logs.Logs(tmp_path, 4, 9, tensorboard=False, bar=False)
    log.scalars(6, {"loss": 0.25, "ratio": float("nan"), "count": 3})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}, {"step": 6, "loss": 0.25, "count": 3.0}]


def test_a_record_that_cannot_be_read_is_left_as_it_is(tmp_path, monkeypatch):
    record = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(record)
    kind = type(logs.epath.Path("/"))

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "read_text", fail)
        patch.setattr(kind, "read_bytes", fail)
        log = logs.Logs(tmp_path, 8, 9, tensorboard=False, bar=False)
    log.scalars(9, {"loss": 0.5})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == record + '{"step": 9, "loss": 0.5}\n'


def test_bytes_that_are_no_text_cost_their_line_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo\xff\xfe\n{"step": 3}\n')
    assert logs.read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3}]
    logs.Logs(tmp_path, 2, 9, tensorboard=False, bar=False).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_writer_that_fails_or_hangs_ends_nothing(tmp_path):
    """A run goes through although nothing can be written; a sink that hangs is left behind."""
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "samples").write_text("")
    result = toys.train(toys.spec(), tmp_path)
    assert result.step == 8
    assert "eval/loss" in result.metrics
    release = threading.Event()
    sink = logs.Sink("hanging", lambda: lambda _: release.wait(), capacity=2)
    began = time.monotonic()
    for item in range(10):
        sink.put(item)
    sink.close(timeout=0.1)
    assert time.monotonic() - began < 5
    assert sink.dropped >= 7
    release.set()


def test_grids_show_every_picture():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8) + 1
    joined = logs.grid(pictures, least=8)
    assert joined.shape == (2 * 4 * 2, 3 * 6 * 2, 3)
    assert set(np.unique(joined)) == {0, 1, 2, 3, 4, 5}
    assert (joined[:8, 12:24] == 2).all()
    assert (joined[8:, :12] == 4).all()


def test_curves_are_drawn(tmp_path):
    toys.train(toys.spec(**{"train.eval_every": 4}), tmp_path)
    logs.plot_curves(tmp_path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) >= 200
        assert len(picture.getcolors(10**6)) > 10


def test_the_bar_shows_loss_speed_and_time_left(tmp_path, capsys):
    log = logs.Logs(tmp_path, 0, 100, tensorboard=False)
    log.say("compiled in 1.0 s")
    log.progress(1)
    log.progress(50, loss="1.25", **{"steps/s": "12"})
    log._bar.refresh()
    log.close()
    shown = capsys.readouterr().err
    for said in ("compiled in 1.0 s", "50/100", "loss=1.25", "steps/s=12", "<00:"):
        assert said in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_files_hold_metrics_and_pictures(tmp_path):
    """TensorFlow stays out of this process, and what writes ends with it."""
    script = (
        f"import sys; sys.path.insert(0, {str(pathlib.Path(toys.__file__).parent)!r}); import pathlib, toys\n"
        f"toys.train(toys.spec(), pathlib.Path({str(tmp_path)!r}), tensorboard=True)\n"
        "from muse_jax.training import events\n"
        "print('tensorflow' in sys.modules, events.Events._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded, pid = done.stdout.split()[-2:]
    assert loaded == "False"
    deadline = time.monotonic() + 120  # importing TensorFlow takes long on a busy machine
    while pathlib.Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the writing process outlives the run"
        time.sleep(0.1)
    from tensorflow.python.summary.summary_iterator import summary_iterator

    (file,) = tmp_path.glob("events.out.tfevents.*")
    found = {(value.tag, event.step) for event in summary_iterator(str(file)) for value in event.summary.value}
    assert {("loss", 2), ("loss", 8), ("eval/loss", 8)} <= found
    assert any(tag.startswith("samples/tokens") and step == 8 for tag, step in found)


def test_steps_do_not_wait_for_the_writers(tmp_path, monkeypatch):
    """A slow disk costs the loop nothing: lines are handed over."""

    class Slow:
        def __init__(self, path):
            pass

        def __call__(self, line):
            time.sleep(0.2)

    monkeypatch.setattr(logs, "_JsonLines", Slow)
    log = logs.Logs(tmp_path, 0, 9, tensorboard=False, bar=False)
    began = time.monotonic()
    for step in range(10):
        log.scalars(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0  # half of what the lines take to be written
    log.close()
