"""gs:// paths work where local ones do. The bucket here is a stand-in (tests/gcs.py)."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import gcs
import jax
import numpy as np
import pytest
import toys
from gcs import BUCKET

from muse_jax import specs
from muse_jax.sampling import folder
from muse_jax.training import locks, logs, meter, profile, reading, resume, stage


@pytest.fixture
def cloud(tmp_path):
    """The server behind gs://bucket."""
    with gcs.standing_in(tmp_path / "cloud") as server:
        yield server


@pytest.fixture
def bucket(cloud):
    """The folder that stands for gs://bucket."""
    cloud.folder.mkdir()
    return cloud.folder


def test_a_pipeline_folder_in_a_bucket(bucket):
    def save(where, number):
        stage.save_stage(where, toys.spec(), {"kernel": np.full(3, number, np.float32)})

    for manifest in ({"seed": 3}, {"seed": 4}):
        folder.write(f"{BUCKET}/made/p", {"tokenizer_low": 1, "base": 2}, manifest, save)
        paths, found = folder.read(f"{BUCKET}/made/p")
        assert found == manifest
    assert sorted(os.listdir(bucket / "made/p")) == ["base", "pipeline.json", "tokenizer_low"]
    np.testing.assert_array_equal(stage.load_stage(paths["base"]).params["kernel"], np.full(3, 2, np.float32))
    with pytest.raises(folder.PipelineError, match="gs://bucket/made/q is not there"):
        folder.read(f"{BUCKET}/made/q")


def test_a_stage_folder_in_a_bucket(bucket):
    params = {"encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    stage.save_stage(f"{BUCKET}/stages/one", toys.spec(), params, {"words": ["a"]}, step=3)
    stage.save_stage(f"{BUCKET}/stages/one", toys.spec(), params, step=5)
    assert sorted(os.listdir(bucket / "stages/one")) == ["config.json", "params.safetensors"]
    loaded = stage.load_stage(f"{BUCKET}/stages/one")
    assert (loaded.spec, loaded.step, loaded.vocabulary) == (toys.spec(), 5, None)
    np.testing.assert_array_equal(loaded.params["encoder"]["kernel"], params["encoder"]["kernel"])
    with pytest.raises(stage.StageError, match="gs://bucket/nowhere"):
        stage.load_stage(f"{BUCKET}/nowhere")


def test_metrics_and_pictures_in_a_bucket(bucket):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after step 3, goes on from step 2
        life = meter.begin(f"{BUCKET}/run", start)
        lines = logs.Logs(f"{BUCKET}/run", start, 4, tensorboard=False, bar=False)
        for step in steps:
            lines.scalars(step, {"loss": 1.0 / step, "trained_seconds": 2.0 * step})
        lines.images(start, {"drawn": np.zeros((2, 4, 4, 3), np.uint8)})
        lines.close()
    assert (life.starts, life.trained) == (2, 4.0)
    assert [line["step"] for line in logs.read_metrics(f"{BUCKET}/run")] == [1, 2, 3, 4]
    assert sorted(os.listdir(bucket / "run/samples")) == ["drawn-0000000.png", "drawn-0000002.png"]
    assert json.loads((bucket / "run/life.json").read_text())["starts"] == 2


def test_a_profile_in_a_bucket(bucket):
    recorded = profile.Profile(specs.ProfileSpec(start_step=1, num_steps=1), f"{BUCKET}/run")
    for step in range(3):
        recorded.before(step, jax.numpy.ones(3))
    assert list(bucket.glob("run/plugins/profile/*/*.xplane.pb"))


def test_a_run_in_a_bucket_gives_the_bits_of_a_local_one(bucket, tmp_path):
    run = toys.spec()
    assert toys.train(run, f"{BUCKET}/run").step == toys.train(run, tmp_path / "local").step == 8
    there, here = (stage.load_stage(where) for where in (f"{BUCKET}/run", tmp_path / "local"))
    assert toys.bits(there.params) == toys.bits(here.params)
    assert sorted(os.listdir(bucket / "run/checkpoints")) == ["6", "8"]
    assert not (bucket / "run" / locks.LOCK).exists()
    assert toys.train(run, f"{BUCKET}/run").was_finished


def test_what_was_being_saved_when_a_run_was_killed_is_no_checkpoint(bucket, tmp_path):
    run = toys.spec()
    toys.train(run, f"{BUCKET}/run")
    expected = toys.bits(stage.load_stage(f"{BUCKET}/run").params)
    checkpoints = reading.checkpoints_in(f"{BUCKET}/run")
    (bucket / "run/checkpoints/8/commit_success.txt").unlink()
    (bucket / "run/checkpoints/8/params/manifest.ocdbt").unlink()
    assert reading.steps_in(checkpoints) == [6]
    result = toys.train(run, f"{BUCKET}/run")
    assert (result.step, result.was_finished) == (8, False)
    assert toys.bits(stage.load_stage(f"{BUCKET}/run").params) == expected
    assert sorted(os.listdir(bucket / "run/checkpoints")) == ["6", "8"]  # nothing was set aside


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, caplog):
    run = toys.spec()
    toys.train(run, f"{BUCKET}/run")
    expected = toys.bits(stage.load_stage(f"{BUCKET}/run").params)
    for path in (bucket / "run/checkpoints/8/params").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    toys.train(run, f"{BUCKET}/run")
    assert "set aside as gs://bucket/run/checkpoints/corrupt-8" in caplog.text
    assert toys.bits(stage.load_stage(f"{BUCKET}/run").params) == expected


def test_a_bucket_that_refuses_a_checkpoint_costs_that_one_only(bucket, cloud, caplog):
    run = toys.spec(**{"train.steps": 12, "train.log_every": 1})
    cloud.refused = "checkpoints/3/params"
    assert toys.train(run, f"{BUCKET}/run").step == 12
    assert "saving the checkpoint of step 3 failed, training goes on" in caplog.text
    assert sorted(map(int, os.listdir(bucket / "run/checkpoints"))) == [9, 12]


def test_answers_that_fail_for_a_moment_are_asked_for_again(bucket, cloud):
    cloud.fails = 2
    assert toys.train(toys.spec(), f"{BUCKET}/run").step == 8
    assert cloud.fails == 0


def test_rights_that_are_missing_are_named_before_anything_is_compiled(bucket, cloud):
    cloud.refused = "/b/bucket?"  # of objects everything is allowed
    with pytest.raises(reading.CheckpointError, match=r"can't look into gs://bucket/run/checkpoints .*buckets\.get"):
        toys.train(toys.spec(), f"{BUCKET}/run")


# --------------------------------------------------------------------------------------- the lease


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.2)
    monkeypatch.setattr(locks, "LEASE", 1.5)
    monkeypatch.setattr(locks, "_PATIENCE", 1.0)


HOLDER = """
import sys, time
import gcs
gcs.use(*sys.argv[1:])
from muse_jax.training import locks
locks.RENEWED, locks.LEASE = 0.2, 1.5
with locks.held("gs://bucket/run"):
    print("holds", flush=True)
    time.sleep(1e9)
"""


def holder(cloud):
    """A process that holds gs://bucket/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cloud.folder), cloud.url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "holds\n"
    return process


def test_two_runs_do_not_share_a_folder_in_a_bucket(bucket, cloud, quick):
    other = holder(cloud)
    try:
        with pytest.raises(resume.ResumeError, match=rf"another run is at work in .*run: process {other.pid} on"):
            toys.train(toys.spec(), f"{BUCKET}/run")
    finally:
        other.kill()
        other.communicate()
    assert os.listdir(bucket / "run") == [locks.LOCK]
    assert toys.train(toys.spec(), f"{BUCKET}/run").step == 8  # which nobody holds any more
    with locks.held(f"{BUCKET}/run"):
        assert json.loads((bucket / "run" / locks.LOCK).read_text())["pid"] == os.getpid()


def test_a_run_that_was_taken_for_dead_ends_when_it_wakes_up(bucket, cloud, quick):
    other = holder(cloud)
    other.send_signal(signal.SIGSTOP)
    with locks.held(f"{BUCKET}/run"):
        other.send_signal(signal.SIGCONT)
        said = other.communicate(timeout=30)[1]
        assert other.returncode == 1
        assert re.search(rf"gs://bucket/run was taken over by process {os.getpid()} on", said)
    assert not (bucket / "run" / locks.LOCK).exists()


def test_a_lease_outlives_an_outage(bucket, cloud, quick, monkeypatch):
    """Also one that is longer than the lease, and one that the other start sees too."""
    other = holder(cloud)
    try:
        cloud.fails = 12
        with pytest.raises(resume.ResumeError, match=r"another run is at work|can't write to"):
            locks.held(f"{BUCKET}/run").__enter__()
        time.sleep(3)
        assert cloud.fails == 0
        with pytest.raises(resume.ResumeError, match="another run is at work"):
            locks.held(f"{BUCKET}/run").__enter__()
    finally:
        other.kill()
        other.communicate()


def test_an_answer_that_gets_lost_leaves_the_lease_with_who_asked(bucket, cloud, quick):
    cloud.lost = 1  # what was written stays, the answer is 503
    with locks.held(f"{BUCKET}/run"):
        assert json.loads((bucket / "run" / locks.LOCK).read_text())["pid"] == os.getpid()
        cloud.lost = 1
        time.sleep(1)
        assert cloud.lost == 0
    assert not (bucket / "run" / locks.LOCK).exists()


def test_a_bucket_that_no_longer_answers_does_not_hold_up_the_end(bucket, cloud, quick):
    def work():
        with locks.held(f"{BUCKET}/run"):
            cloud.fails = 10**6
            time.sleep(0.5)
            raise RuntimeError("what went wrong")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="what went wrong"):
        work()
    assert time.monotonic() - began < 10


def test_a_lease_that_somebody_deleted_is_taken_again(bucket, cloud, quick):
    with locks.held(f"{BUCKET}/run"):
        (bucket / "run" / locks.LOCK).unlink()
        time.sleep(1)
        assert json.loads((bucket / "run" / locks.LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("name", ["run#1", "run%2d1", "a run?x"])
def test_a_folder_may_have_any_name(bucket, cloud, quick, name):
    with locks.held(f"{BUCKET}/{name}"):
        assert [path.name for path in bucket.iterdir()] == [name]


def test_a_bucket_that_nothing_can_be_written_to_is_an_error_before_all_else(bucket, cloud):
    cloud.refused = locks.LOCK
    with pytest.raises(resume.ResumeError, match=r"can't write to gs://bucket/run .*; choose another --workdir"):
        toys.train(toys.spec(), f"{BUCKET}/run")
