"""Runs in processes of their own, killed and asked to stop at any moment."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import toys

from muse_jax.training import logs
from muse_jax.training.checkpoint import load_stage

TOYS = pathlib.Path(__file__).parent / "toys.py"
CHANGES = {"train.steps": 40, "checkpoint.every_steps": 4, "optimizer.ema_decay": 0.9}


def start(workdir, kind="masked", pause=0.03, **changes):
    """Starts a toy's run."""
    environment = {**os.environ, "TOY_PAUSE": str(pause), "JAX_NUM_CPU_DEVICES": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    return subprocess.Popen(
        [sys.executable, str(TOYS), kind, str(workdir), json.dumps({**CHANGES, **changes})],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until(condition, process, seconds=60):
    """Polls fast, so that what comes next hits the moment; False if the process ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return True


def finish(process, seconds=90):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def checkpoint_in_the_making(workdir):
    return lambda: any(workdir.glob("checkpoints/*orbax-checkpoint-tmp*"))


def has_step(workdir, step):
    return lambda: any(int(p.name) >= step for p in workdir.glob("checkpoints/[0-9]*") if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bits of the final parameters (EMA) of runs that were never disturbed, in one process each."""
    found = {}

    def of(kind):
        if kind not in found:
            workdir = tmp_path_factory.mktemp(kind)
            code, output = finish(start(workdir, kind, pause=0))
            assert code == 0, output
            found[kind] = toys.bits(load_stage(workdir).params)
        return found[kind]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(toys.TASKS))
def test_killed_anywhere_and_started_again_gives_the_same_bits(tmp_path, whole, kind):
    """SIGKILL while a checkpoint is written, at random moments, and while starting."""
    rng = random.Random(kind)
    moments = [
        lambda p: wait_until(checkpoint_in_the_making(tmp_path), p),
        lambda p: wait_until(has_step(tmp_path, 8), p) and time.sleep(rng.uniform(0, 0.15)) is None,
        lambda p: time.sleep(rng.uniform(0.5, 2)) is None,
        lambda p: wait_until(has_step(tmp_path, 16), p) and wait_until(checkpoint_in_the_making(tmp_path), p),
    ]
    kills = 0
    for moment in moments:
        process = start(tmp_path, kind)
        if moment(process):
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills == len(moments)
    code, output = finish(start(tmp_path, kind, pause=0))
    assert (code, output.splitlines()[-1]) == (0, "done 40")
    assert "compiled otherwise" not in output
    assert toys.bits(load_stage(tmp_path).params) == whole(kind)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["36", "40"]
    steps = [line["step"] for line in logs.read_metrics(tmp_path) if "loss" in line]
    assert steps == list(range(2, 41, 2))


@pytest.mark.slow
def test_sigterm_at_any_time_saves_and_ends_cleanly(tmp_path, whole):
    """Also while starting, compiling and waiting for data; then the run goes on to the same bits."""
    moments = [
        lambda p: wait_until((tmp_path / "config.json").exists, p),  # about to load and compile
        lambda p: time.sleep(1.0) is None,
        lambda p: wait_until(has_step(tmp_path, 4), p),
        lambda p: wait_until(checkpoint_in_the_making(tmp_path), p),
    ]
    for number, moment in enumerate(moments):
        process = start(tmp_path)
        assert moment(process)
        process.send_signal(signal.SIGTERM)
        if number == 3:
            time.sleep(0.01)
            process.send_signal(signal.SIGTERM)  # a second one, while saving
        asked = time.monotonic()
        code, output = finish(process)
        assert time.monotonic() - asked < 30
        if number == 1 and code == -signal.SIGTERM:
            continue  # it came before the run had begun: Python itself was still starting
        assert code == 143, output
        assert "stopped by SIGTERM at step" in output
        step = int(output.split("at step ")[-1].split(",")[0])
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
    code, output = finish(start(tmp_path, pause=0))
    assert code == 0, output
    assert toys.bits(load_stage(tmp_path).params) == whole("masked")


@pytest.mark.slow
def test_sigterm_while_the_data_hang(tmp_path):
    process = start(tmp_path, pause=1000)
    wait_until((tmp_path / "config.json").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 30)
    assert code == 143, output


@pytest.mark.slow
def test_a_second_run_in_the_workdir_is_refused(tmp_path):
    """It names the first; once that one is dead, however it died, the workdir is free."""
    first = start(tmp_path, pause=0.2)
    assert wait_until(has_step(tmp_path, 4), first)
    code, output = finish(start(tmp_path))
    assert code == 1
    assert f"process {first.pid} on " in output
    first.kill()
    first.wait()
    first.stdout.close()
    code, output = finish(start(tmp_path, pause=0))
    assert (code, output.splitlines()[-1]) == (0, "done 40")


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(tmp_path):
    """With a limit on file sizes, which stops writers in C++ too, saving fails three times and the run ends."""
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:2] = [];"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import toys; real = toys.batch_of;\n"
        "def batch_of(step, *rest):\n"
        "    if step == 15: resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "    if step == 27 and sys.argv[2] == 'again':"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "    return real(step, *rest)\n"
        "toys.batch_of = batch_of\n"
        "spec = toys.spec(**{'train.steps': 40, 'checkpoint.every_steps': 8, 'train.log_every': 8});"
        "print('ended at', toys.train(spec, sys.argv[1], pause=0.1).step)"
    )
    for ending in ("again", "never"):
        workdir = tmp_path / ending
        process = subprocess.run(
            [sys.executable, "-c", script, str(TOYS.parent), str(workdir), ending],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
        if ending == "again":
            assert process.stdout.splitlines()[-1:] == ["ended at 40"], process.stderr
            assert kept == [32, 40]
            assert "saving the checkpoint of step 16 failed, training goes on" in process.stderr
        else:
            assert process.returncode == 1
            assert "failed 3 times" in process.stderr
            assert kept == [8]
        load_stage(workdir)


PROGRAM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import jax, toys
from muse_jax.training import sharding, step
run, task = toys.spec(), toys.Adversaries()
program = step.Program(run, task, sharding.make_mesh(run.mesh), task.frozen())
text = program.lower_train(program.abstract_batch(toys.batch_of(0, 4))).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_compiles_the_same_step():
    """Whatever Python's hashes of strings are: hosts that compiled two orders would wait for each other."""
    made = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "JAX_NUM_CPU_DEVICES": "1"}
        words = [sys.executable, "-c", PROGRAM, str(TOYS.parent)]
        made.add(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(made) == 1
