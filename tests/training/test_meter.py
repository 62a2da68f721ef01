"""What a run says of itself: rates, where the time went, goodput over its life, a profile on request."""

import json
import os
import pathlib
import shutil
import time

import jax
import pytest
import toys

from muse_jax import ahead, roofline
from muse_jax.training import logs, meter, reading

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[2] / "configs").rglob("*.py"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 + now[0])
    return now


def test_every_second_belongs_to_one_kind(clock):
    found = meter.Meter(meter.Work(images=8, devices=4, flops=50.0, peak_flops=25.0))
    for kind, seconds in (("start", 1.0), ("compile", 4.0)):
        with found.during(kind):
            clock[0] += seconds
    with found.during("step"):
        for _ in range(10):
            with found.during("data"):
                clock[0] += 0.25
            clock[0] += 0.5
        with found.during("checkpoint"):
            clock[0] += 2.0
            with found.during("step"):  # the step that a checkpoint had to wait for
                clock[0] += 0.5
        line = found.line(10)
    assert line["steps_per_second"] == pytest.approx(10 / 8.0)  # 10 x 0.75 s and 0.5 s
    assert line["images_per_second_per_chip"] == pytest.approx(10 / 8.0 * 8 / 4)
    assert line["model_flops_utilisation"] == pytest.approx(10 / 8.0 * 50 / (4 * 25))
    seconds = {kind: line[f"time/{kind}"] * 15.0 for kind in meter.KINDS}
    expected = {"step": 5.5, "data": 2.5, "checkpoint": 2.0, "compile": 4.0, "evaluate": 0.0, "start": 1.0}
    assert seconds == pytest.approx(expected)
    assert line["trained_seconds"] == pytest.approx(5.5)
    assert line["goodput"] == pytest.approx(5.5 / 15)
    with found.during("step"):
        clock[0] += 1.0
        line = found.line(12)  # counts from the line before
    assert line["steps_per_second"] == pytest.approx(2.0)
    assert line["trained_seconds"] == pytest.approx(6.5)


def test_what_is_not_known_is_not_said():
    line = meter.Meter(meter.Work(images=8, devices=1)).line(1)
    assert "model_flops_utilisation" not in line
    assert "peak_memory_bytes" not in line, "the CPU backend doesn't tell"


def test_goodput_counts_restarts_and_steps_done_twice(tmp_path, clock):
    first = meter.begin(tmp_path, 0)
    assert (first.starts, first.trained) == (1, 0.0)
    lines = [{"step": step, "trained_seconds": 10.0 * step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clock[0] += 70  # killed after step 3, and started again from the checkpoint of step 2
    second = meter.begin(tmp_path, 2)
    assert (second.starts, second.trained) == (2, 20.0)
    clock[0] += 30
    assert second.goodput(40.0) == pytest.approx(0.4)


def test_goodput_counts_steps_between_the_last_line_and_the_checkpoint(tmp_path):
    """A run that is killed goes on with what the checkpoint says, whatever lines there are."""
    run = toys.spec(**{"train.log_every": 8, "checkpoint.every_steps": 3, "optimizer.schedule": "constant"})
    toys.train(run, tmp_path, pause=0.05)
    trained = [reading.read_meta(reading.checkpoints_in(tmp_path) / str(step))["trained_seconds"] for step in (6, 8)]
    assert 0 < trained[0] < trained[1]
    shutil.rmtree(tmp_path / "checkpoints/8")
    (tmp_path / "metrics.jsonl").unlink()
    toys.train(run, tmp_path)
    again = reading.read_meta(reading.checkpoints_in(tmp_path) / "8")["trained_seconds"]
    assert again > trained[0]
    assert [line for line in logs.read_metrics(tmp_path) if "goodput" in line][-1]["trained_seconds"] > trained[0]


def test_a_run_that_was_finished_lost_no_time_until_it_is_made_longer(tmp_path):
    meter.begin(tmp_path, 0)
    finished = {"step": 3, logs.FINISHED: True}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 3, "trained_seconds": 900.0}) + "\n" + json.dumps(finished)
    )
    (tmp_path / "life.json").write_text(json.dumps({"began": time.time() - 2000, "starts": 1}))
    os.utime(tmp_path / "metrics.jsonl", (time.time() - 1000,) * 2)  # done after 1000 seconds
    assert meter.begin(tmp_path, 3).goodput(900.0) == pytest.approx(0.9, abs=0.02)


def test_a_damaged_life_is_said_and_begun_anew(tmp_path, caplog):
    (tmp_path / "life.json").write_text('{"began": ')
    assert meter.begin(tmp_path, 0).starts == 1
    assert "damaged" in caplog.text


def test_lines_of_a_run(tmp_path):
    run = toys.spec(**{"train.eval_every": 4, "seed": 17})  # a seed of its own: nothing is compiled already
    toys.train(run, tmp_path, model_flops=1e6, peak_flops=1e12)
    first, *later = [line for line in logs.read_metrics(tmp_path) if "steps_per_second" in line]
    assert 0.2 < first["time/compile"] <= 1, "a toy's first seconds are compiling"
    assert all(line["time/compile"] == 0 for line in later)
    for line in (first, *later):
        assert line["images_per_second_per_chip"] == pytest.approx(line["steps_per_second"] * run.train.batch_size)
        assert line["model_flops_utilisation"] == pytest.approx(line["steps_per_second"] * 1e-6)
        assert sum(line[f"time/{kind}"] for kind in meter.KINDS) == pytest.approx(1)
        assert 0 < line["goodput"] <= 1
    assert sum(line["time/evaluate"] for line in later) > 0
    seconds = [line["trained_seconds"] for line in (first, *later)]
    assert seconds == sorted(seconds)
    assert json.loads((tmp_path / "life.json").read_text())["starts"] == 1


def test_waiting_for_data_shows(tmp_path):
    toys.train(toys.spec(), tmp_path, pause=0.4)
    lines = [line for line in logs.read_metrics(tmp_path) if "time/data" in line]
    assert max(line["time/data"] for line in lines) > 0.3


def test_a_profile_on_request(tmp_path):
    """A file that XProf's reader reads, with the step in it; and the run is what it is without."""
    plain = toys.train(toys.spec(), tmp_path / "plain")
    run = toys.spec(**{"profile.start_step": 4, "profile.num_steps": 2})
    assert toys.train(run, tmp_path / "run").metrics["loss"] == plain.metrics["loss"]
    (file,) = (tmp_path / "run").glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    names = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    assert any("train_step" in name for name in names)
    assert not list((tmp_path / "plain").glob("plugins/**/*"))


def test_a_profile_that_is_cut_short_is_written(tmp_path):
    run = toys.spec(**{"profile.start_step": 7, "profile.num_steps": 100})
    toys.train(run, tmp_path)
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_peaks_of_devices():
    class Device:
        platform, device_kind = "gpu", "NVIDIA A100-SXM4-80GB"

    assert roofline.peak_flops(Device()) == 312e12
    Device.device_kind = "NVIDIA H100 80GB HBM3"
    assert roofline.peak_flops(Device()) == 989e12
    Device.device_kind = "TPU v5 lite"
    assert roofline.peak_flops(Device()) == 197e12
    assert 1e6 < roofline.peak_flops(jax.devices()[0]) < 1e14


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_the_keys_of_a_profile(config):
    assert {"start_step", "num_steps"} == set(ahead.read_config(config).profile)
