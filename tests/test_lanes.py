"""Commands side by side: who runs when and where, and what happens when one of them, or all, must end."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from muse_jax import lanes

PROGRAM = """
import os, pathlib, sys, time
from muse_jax import process
process.end_with_parent()
name, seconds, code = sys.argv[1:]
cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
pathlib.Path(f"{name}.began").write_text(f"{os.getpid()} {cores} {os.environ['TQDM_DESC']}")
time.sleep(float(seconds))
pathlib.Path(f"{name}.ended").write_text("")
sys.exit(int(code))
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    (tmp_path / "sleeper.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sleeper(name: str, seconds: float = 0.0, code: int = 0) -> lanes.Job:
    return lanes.Job(name, ("sleeper", name, str(seconds), str(code)))


def began(here: pathlib.Path, name: str) -> list[str]:
    return (here / f"{name}.began").read_text().split()


@contextlib.contextmanager
def unwatched(job: lanes.Job):
    yield


def test_lanes_run_at_once_on_their_own_cores_and_each_in_order(here):
    order: list[str] = []

    @contextlib.contextmanager
    def watched(job):
        order.append(f"+{job.title}")
        yield
        order.append(f"-{job.title}")

    every = lanes.cores()
    lanes.run([[sleeper("a", 8.0)], [sleeper("b"), sleeper("c"), sleeper("d", 8.0)]], watched)
    assert order[:2] == ["+a", "+b"]
    assert order.index("-b") < order.index("+c") < order.index("-c") < order.index("+d")
    assert order.index("+d") < order.index("-a") < order.index("-d")
    assert began(here, "b")[2] == "b", "progress bars have names"
    if len(every) > 1:
        assert set(began(here, "a")[1].split(",")).isdisjoint(began(here, "b")[1].split(","))
    assert lanes.cores() == every, "our own cores are as they were"


def test_a_job_that_is_left_alone_has_all_cores(here):
    lanes.run([[sleeper("a")], [sleeper("b", 2.0), sleeper("c")]], unwatched)
    assert began(here, "c")[1] == ",".join(map(str, lanes.cores()))


def test_one_that_fails_stops_the_others(here):
    with pytest.raises(lanes.JobError, match="a ended with exit code 3: python -m sleeper a 0.0 3") as failed:
        lanes.run([[sleeper("a", 0.0, 3), sleeper("next")], [sleeper("b", 300.0)]], unwatched)
    assert not failed.value.was_stopped
    assert not (here / "next.began").exists()
    assert not (here / "b.ended").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_end_with_the_process_that_started_them(here, number):
    program = """
import contextlib
from muse_jax import lanes
lanes.run([[lanes.Job("a", ("sleeper", "a", "300", "0"))]], lambda job: contextlib.nullcontext())
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (here / "a.began").exists() or not began(here, "a"):
        assert parent.poll() is None
        time.sleep(0.1)
    child = int(began(here, "a")[0])
    parent.send_signal(number)
    parent.wait(timeout=60)
    for _ in range(100):
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
