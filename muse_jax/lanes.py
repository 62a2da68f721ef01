"""Runs commands side by side, each lane of them on a part of this machine's CPU cores.

A small model's step keeps one core busy, but not two: its operations are too short to be shared out. Two
models trained at once, each on its own core, get through a third more steps than one after the other.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a command that saved and stopped


@dataclasses.dataclass(frozen=True)
class Job:
    """A command: `python -m` and these words; its progress bar is called by the title."""

    title: str
    command: tuple[str, ...]


class JobError(Exception):
    """A job ended with an exit code other than 0; what went wrong it has said itself."""

    def __init__(self, job: Job, exit_code: int):
        super().__init__(f"{job.title} ended with exit code {exit_code}: python -m {' '.join(job.command)}")
        self.exit_code = exit_code

    @property
    def was_stopped(self) -> bool:
        """Whether it was asked to end, and saved what it had."""
        return self.exit_code in STOPPED


def cores() -> list[int]:
    """The CPU cores that this process may run on; [] where the system doesn't say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run(lanes: Sequence[Sequence[Job]], around: Callable[[Job], contextlib.AbstractContextManager]) -> None:
    """Runs the jobs of each lane one after another, and the lanes at the same time.

    While several lanes have work each has an equal part of the cores; a job that starts when the others are
    done has all of them. Jobs end when this process does, however it ends: see `muse_jax.process.end_with_parent`.

    Args:
      around: what a job runs in, a clock for one.

    Raises:
      JobError: of the first job that fails; the others are stopped first, by SIGTERM.
    """
    waiting = [list(lane) for lane in lanes]
    running: dict[int, _Running] = {}
    try:
        while any(waiting) or running:
            for lane, jobs in enumerate(waiting):
                if jobs and lane not in running:
                    alone = not any(rest or other in running for other, rest in enumerate(waiting) if other != lane)
                    share = () if alone else cores()[lane :: len(lanes)]
                    running[lane] = _Running(jobs.pop(0), lane, share, around)
            time.sleep(0.1)
            for lane in [lane for lane, one in running.items() if one.ended()]:
                running.pop(lane).close()
    finally:
        for one in running.values():
            one.child.send_signal(signal.SIGTERM)
        for one in running.values():
            one.stop()


class _Running:
    """A job's process."""

    def __init__(self, job: Job, line: int, share: Sequence[int], around: Callable[[Job], Any]):
        self.job = job
        self._context = contextlib.ExitStack()
        self._context.enter_context(around(job))
        # tqdm's own: what a bar is called, and its line on the screen.
        names = {"TQDM_DESC": job.title, "TQDM_POSITION": str(line), "MUSE_JAX_PARENT": str(os.getpid())}
        with _on(share):
            self.child = subprocess.Popen([sys.executable, "-m", *job.command], env={**os.environ, **names})

    def ended(self) -> bool:
        return self.child.poll() is not None

    def close(self) -> None:
        self._context.close()
        if self.child.returncode:
            raise JobError(self.job, self.child.returncode)

    def stop(self) -> None:
        self.child.wait()
        self._context.close()


@contextlib.contextmanager
def _on(share: Sequence[int]) -> Iterator[None]:
    """Lets what is started within have these cores, of which there may be none: then all of ours."""
    if not share:
        yield
        return
    every = cores()
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)
