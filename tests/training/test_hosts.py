"""Several processes as one run, on this machine: trained as by one, saved by all, restored by any number."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import gcs
import jax
import numpy as np
import pytest

from muse_jax.training import logs, reading
from muse_jax.training.checkpoint import load_stage, read_meta

TOYS = pathlib.Path(__file__).parent / "toys.py"
DEVICES = 8  # of all processes together
CHANGES = {
    "train.steps": 12,
    "train.batch_size": 8,
    "checkpoint.every_steps": 4,
    "optimizer.ema_decay": 0.9,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "deadlines.heartbeat": 20,
}


def start(workdir, processes=2, environment=(), **changes):
    """Starts a toy's run on `processes` processes that have 8 devices between them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = [sys.executable, str(TOYS), "masked", str(workdir), json.dumps({**CHANGES, **changes})]
    common = {**os.environ, "JAX_NUM_CPU_DEVICES": f"{DEVICES // processes}"}
    environment = list(environment) or [{}] * processes
    return [
        subprocess.Popen(
            [*words, *([address, str(processes), str(index)] if processes > 1 else [])],
            env={**common, **environment[index]}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip


def finish(processes, seconds=200):
    """[(exit code, output)] of all."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def wait_until(condition, processes, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def has_step(workdir, step):
    return lambda: any(s >= step for s in reading.steps_in(reading.checkpoints_in(workdir)))


def checkpoint_in_the_making(workdir):
    return lambda: any(workdir.glob("checkpoints/*orbax-checkpoint-tmp*"))


def losses(workdir):
    return {line["step"]: line["loss"] for line in logs.read_metrics(workdir) if "loss" in line}


def fingerprints(workdir, step):
    leaves = read_meta(reading.checkpoints_in(workdir) / str(step))["leaves"]
    return {item: {name: leaf[2] for name, leaf in named.items()} for item, named in leaves.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The workdir of an undisturbed run of two processes."""
    workdir = tmp_path_factory.mktemp("two")
    ended = finish(start(workdir))
    assert [code for code, _ in ended] == [0, 0], ended
    assert all(output.splitlines()[-1] == "done 12" for _, output in ended)
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one_does(two, tmp_path):
    [(code, output)] = finish(start(tmp_path, processes=1))
    assert code == 0, output
    assert losses(two).keys() == losses(tmp_path).keys()
    np.testing.assert_allclose(list(losses(two).values()), list(losses(tmp_path).values()), rtol=1e-6)
    ours, theirs = load_stage(two).params, load_stage(tmp_path).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    meta = [json.loads((folder / "checkpoints/12/meta/metadata").read_text()) for folder in (two, tmp_path)]
    assert meta[0]["config"] == meta[1]["config"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_what_two_saved_any_number_restores(two, tmp_path, processes):
    """The other processes go on from the same bits: restoring compares fingerprints, and it is saved again."""
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    ended = finish(start(workdir, processes, **{"train.steps": 13, "optimizer.schedule": "cosine"}))
    assert [code for code, _ in ended] == [0] * processes, ended
    kept = reading.steps_in(reading.checkpoints_in(workdir))
    assert kept == [12, 13]
    assert fingerprints(workdir, 12) == fingerprints(two, 12)


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_killed_while_saving_and_go_on_to_the_same_bits(two, tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    with gcs.serving(bucket) as server:
        environment = [{"TOY_BUCKET": f"{bucket}|{server.url}", "TOY_PAUSE": "0.05", "TOY_LEASE": "2"}] * 2
        processes = start("gs://bucket/run", environment=environment)
        marks = bucket / "run/checkpoints/8/commit_success.txt"
        wait_until(lambda: (bucket / "run/checkpoints/8").exists() and not marks.exists(), processes)
        for process in processes:
            process.kill()
        finish(processes)
        assert not marks.exists()
        assert (bucket / "run/.lock").exists()  # nobody could give it back
        ended = finish(start("gs://bucket/run", environment=environment))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "if it isn't renewed in 2 seconds, this run goes on there" in ended[0][1]
    assert fingerprints(bucket / "run", 12) == fingerprints(two, 12)
    assert losses(bucket / "run") == losses(two)
    assert not (bucket / "run/.lock").exists()


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_the_same_step(two, tmp_path):
    """Asked in the midst of training, and again while a run that goes on is still starting."""
    processes = start(tmp_path, environment=[{"TOY_PAUSE": "0.3"}] * 2, **{"checkpoint.every_steps": 100})
    wait_until(lambda: losses(tmp_path), processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    steps = {output.split("at step ")[-1].split(",")[0] for _, output in ended}
    assert len(steps) == 1
    assert reading.steps_in(reading.checkpoints_in(tmp_path)) == [int(step) for step in steps]
    processes = start(tmp_path, environment=[{"TOY_PAUSE": "0.3"}] * 2)
    wait_until(lambda: f'"pid": {processes[0].pid}}}' in (tmp_path / ".lock").read_text(), processes)
    processes[0].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    ended = finish(start(tmp_path))
    assert [code for code, _ in ended] == [0, 0], ended
    assert fingerprints(tmp_path, 12) == fingerprints(two, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "moment"), [(1, "step"), (0, "step"), (1, "checkpoint")])
def test_one_killed_ends_the_other_and_both_go_on_to_the_same_bits(two, tmp_path, killed, moment):
    processes = start(tmp_path, environment=[{"TOY_PAUSE": "0.2"}] * 2)
    if moment == "step":
        wait_until(has_step(tmp_path, 4), processes)
        time.sleep(0.3)
    else:
        wait_until(has_step(tmp_path, 4), processes)
        wait_until(checkpoint_in_the_making(tmp_path), processes)
    processes[killed].kill()
    began = time.monotonic()
    code, output = finish(processes)[1 - killed]
    assert time.monotonic() - began < CHANGES["deadlines.heartbeat"] + 15
    assert code not in (0, 143)
    if killed == 1:
        assert code == 1
        assert f"process 1 ({socket.gethostname()}, pid {processes[1].pid}) is gone or can't be reached" in output
        assert "Start all processes again" in output
    else:
        assert "process 0 is gone" in output or "coordination service" in output, output
    ended = finish(start(tmp_path))
    assert [code for code, _ in ended] == [0, 0], ended
    assert fingerprints(tmp_path, 12) == fingerprints(two, 12)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12", "8"]


@pytest.mark.slow
def test_a_process_that_is_stuck_ends_the_run_and_is_named(tmp_path):
    deadlines = {"deadlines.step": 8, "deadlines.data": 12}
    ended = finish(start(tmp_path, environment=[{}, {"TOY_HANG_AT": "6"}], **deadlines))
    codes = [code for code, _ in ended]
    assert 124 in codes
    assert 0 not in codes
    for _, output in ended:
        assert "'step' at step " in output
        assert "process 1 (" in output
    assert any("The others wait for process 1." in output for _, output in ended)
    assert any("process 1" in line and "'data' at step 6" in line for _, out in ended for line in out.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["joined", "training"])
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_is_frozen_is_named_in_time(tmp_path, process, moment):
    """As on a host that answers no more, though its connections stay open. Process 0 is the one that all ask."""
    slowly = [{"TOY_PAUSE": "0.5"}] * 2
    changes = {"train.steps": 200, "checkpoint.keep": 2, "deadlines.heartbeat": 8}
    processes = start(tmp_path, environment=slowly, **changes)
    wait_until((tmp_path / ".lock").exists if moment == "joined" else has_step(tmp_path, 4), processes)
    processes[process].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    other = processes[1 - process]
    try:
        output, _ = other.communicate(timeout=60)
    finally:
        for one in processes:
            one.kill()
            one.communicate()
    assert other.returncode == 1, output
    assert f"watchdog: process {process}" in output
    assert "is gone or can't be reached" in output
    assert time.monotonic() - began < 8 + 30, "before jax's own heartbeats abort it without a word"


@pytest.mark.slow
def test_a_deadline_of_0_waits_for_the_others_for_ever(tmp_path):
    ended = finish(start(tmp_path, **{"deadlines.start": 0.0}))
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_of_them_for_a_while(two, tmp_path):
    """Process 1 can't write at step 8: neither saves that step, both train on, and the next one is saved by both."""
    slowly = {"TOY_PAUSE": "1"}  # so that batches are not loaded long before their steps
    ended = finish(start(tmp_path, environment=[slowly, {**slowly, "TOY_FULL": "7 10"}]))
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("saving the checkpoint of step 8 failed, training goes on" in output for _, output in ended)
    assert "process 1 (" in ended[0][1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12", "4"]
    assert fingerprints(tmp_path, 12) == fingerprints(two, 12)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_the_clock_of_one_of_them_decides_nothing(two, tmp_path, process):
    clocks = [{"TOY_CLOCK_AHEAD": str(24 * 3600 if index == process else 0)} for index in range(2)]
    ended = finish(start(tmp_path, environment=clocks))
    assert [code for code, _ in ended] == [0, 0], ended
    kept = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (tmp_path, two)]
    assert kept[0] == kept[1]
    assert fingerprints(tmp_path, 12) == fingerprints(two, 12)


@pytest.mark.slow
def test_samples_that_one_of_them_cannot_compile_end_both(tmp_path):
    """The other one may be waiting for it."""
    ended = finish(start(tmp_path, environment=[{}, {"TOY_UNDRAWABLE": "1"}], **{"train.sample_every": 4}))
    assert [code for code, _ in ended] == [1, 1], ended
    assert "failed: ValueError: it can't be drawn" in ended[0][1]


@pytest.mark.slow
def test_a_process_whose_data_are_slow_shows_in_the_lines_of_process_0(tmp_path):
    changes = {"train.log_every": 4, "checkpoint.every_steps": 100}
    ended = finish(start(tmp_path, environment=[{}, {"TOY_PAUSE": "1.2"}], **changes))
    assert [code for code, _ in ended] == [0, 0], ended
    lines = [line for line in logs.read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["time/data"] < 0.2
    assert lines[-1]["time/data_slowest"] > 0.5  # in the lines before there is compiling too
    (named,) = (line for line in ended[0][1].splitlines() if "waits for data" in line)
    assert "process 1 (" in named
