"""Where a run's time goes and how fast it trains: what every line of metrics.jsonl says beside the losses.

    steps_per_second             without checkpoints, evaluation, compiling and starting
    images_per_second_per_chip   the same in examples of a device
    model_flops_utilisation      the networks' own FLOPs (muse_jax/flops.py) over the device's peak, where it is known
    time/step, time/data, time/checkpoint, time/compile, time/evaluate, time/start
                                 shares of the time since the line before: training, and what it waited for;
                                 "evaluate" has samples and profiles too, "start" is restoring, or making, the state
    time/data_slowest            of several processes, of which the lines are process 0's: the share of the one that
                                 waited longest for data, and the others for it; to within a second
    trained_seconds              spent in the steps that led to this one, by whatever process
    goodput                      trained_seconds over the time since the run was first started: what restarts,
                                 steps done twice and all waits cost
    peak_memory_bytes            of the fullest device here, where the backend tells

A run's life is in `life.json`, which outlives its processes.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from muse_jax.training import logs
from muse_jax.training.stage import write_json

LIFE = "life.json"
STEP, START = "step", "start"
KINDS = (STEP, "data", "checkpoint", "compile", "evaluate", START)
PHASES = {"save": "checkpoint", "samples": "evaluate"}  # of the trainer, where they aren't called as here
NOT_TRAINING = ("checkpoint", "compile", "evaluate", START)  # what steps_per_second leaves out


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is.

    Attributes:
      images: examples of a step.
      devices: that share them.
      flops: of the networks, in a step; 0 where not known.
      peak_flops: of a device, a second; 0 where not known.
    """

    images: int
    devices: int
    flops: float = 0.0
    peak_flops: float = 0.0

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """The lines' rates that follow from the steps'."""
        found = {
            "steps_per_second": steps_per_second,
            "images_per_second_per_chip": steps_per_second * self.images / self.devices,
        }
        if self.flops > 0 and self.peak_flops > 0:
            peak = self.devices * self.peak_flops
            found["model_flops_utilisation"] = steps_per_second * self.flops / peak
        return found


@dataclasses.dataclass(frozen=True)
class Life:
    """From a run's first start on.

    Attributes:
      began: the first start, in seconds since 1970; moved on by the time for which the run was finished.
      starts: how many there were.
      trained: seconds in the steps up to the one that this process goes on from.
    """

    began: float
    starts: int
    trained: float

    def goodput(self, trained: float) -> float:
        """Share of the life that went into the steps up to now."""
        return min(1.0, trained / max(time.time() - self.began, 1e-9))


def begin(workdir: Any, step: int, write: bool = True, trained: float | None = None) -> Life:
    """The life of the run in the workdir, one start older.

    Args:
      step: the step it goes on from; what was trained after it is lost.
      write: whether this process keeps life.json.
      trained: seconds in the steps up to it; None: those of the last line of metrics before it.
    """
    path, lines, now = epath.Path(workdir) / LIFE, logs.read_metrics(workdir), time.time()
    began, starts = _before(path, now)
    if lines and lines[-1].get(logs.FINISHED):  # it was done; that it is to go on for longer is no fault of it
        began += now - (epath.Path(workdir) / logs.METRICS).stat().mtime
    if trained is None:
        trained = max((line.get("trained_seconds", 0.0) for line in lines if line["step"] <= step), default=0.0)
    if write:
        write_json(path, {"began": began, "starts": starts + 1})
    return Life(began, starts + 1, trained)


def _before(path: epath.Path, now: float) -> tuple[float, int]:
    if not path.exists():
        return now, 0
    try:
        held = json.loads(path.read_text())
        return float(held["began"]), int(held["starts"])
    except (ValueError, KeyError, TypeError) as error:
        logging.warning("%s is damaged (%s); goodput is counted from now on.", path, error)
        return now, 0


class Meter:
    """A clock that always runs for one of `KINDS`."""

    def __init__(self, work: Work, life: Life | None = None):
        self.work, self.life = work, life or Life(time.time(), 1, 0.0)
        self._kind, self._since = START, time.monotonic()
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._line, self._at = dict(self._spent), 0

    def begin(self, life: Life, step: int) -> None:
        """The life that this process is a part of, and the step it goes on from."""
        self.life, self._at = life, step

    @property
    def trained(self) -> float:
        """Seconds in the steps that led to this one, by whatever process, up to the last change of what is done."""
        return self.life.trained + self._spent[STEP]

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Time of this kind, whatever it is a part of."""
        before = self._kind
        self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, kind: str) -> None:
        now = time.monotonic()
        self._spent[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def line(self, step: int) -> dict[str, float]:
        """What the line of a step says; see the top of this file. The next line counts from here."""
        self._switch(self._kind)
        spent = {kind: seconds - self._line[kind] for kind, seconds in self._spent.items()}
        whole = max(sum(spent.values()), 1e-9)
        training = max(whole - sum(spent[kind] for kind in NOT_TRAINING), 1e-9)
        trained = self.trained
        found = self.work.rates((step - self._at) / training)
        found |= {f"time/{kind}": spent[kind] / whole for kind in KINDS}
        found |= {"trained_seconds": trained, "goodput": self.life.goodput(trained)}
        self._line, self._at = dict(self._spent), step
        return found | peak_memory()


def peak_memory() -> dict[str, float]:
    """{"peak_memory_bytes": of the fullest device of this process}; {} where the backend doesn't tell (CPU)."""
    every: list[Mapping[str, Any]] = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in every if "peak_bytes_in_use" in stats]
    return {"peak_memory_bytes": float(max(peaks))} if peaks else {}
