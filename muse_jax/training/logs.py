"""What a run says while it trains: metrics.jsonl, TensorBoard files, pictures, a progress bar, curves.

`metrics.jsonl` is the record; one JSON object a line with "step". TensorBoard files are written
through clu in a process of their own. Writers have threads and never hold up or end a run: what can't
be written is counted and dropped.
"""

import contextlib
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from muse_jax.training import events

METRICS = "metrics.jsonl"
FINISHED = "finished"  # key of the last line of a run that is complete


class Sink:
    """A thread that writes what it is given, in order; failures are counted, said once, and otherwise ignored."""

    def __init__(self, name: str, start: Callable[[], Callable[[Any], None]], capacity: int = 1000):
        self.name, self._start = name, start
        self.dropped = 0
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=capacity)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"muse_jax {name}")
        self._thread.start()

    def put(self, item: Any) -> None:
        """Hands over an item; drops it if the thread is far behind."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._drop("its queue is full")

    def _run(self) -> None:
        write: Callable[[Any], None] | None = None
        while (item := self._queue.get()) is not None:
            try:
                write = write or self._start()
                write(item)
            except BaseException as error:
                self._drop(f"{type(error).__name__}: {error}")
        if write is not None and hasattr(write, "close"):
            with contextlib.suppress(BaseException):
                write.close()

    def _drop(self, reason: str) -> None:
        self.dropped += 1
        if self.dropped == 1:
            logging.warning("%s can't be written, training goes on without it: %s", self.name, reason)

    def close(self, timeout: float = 30) -> None:
        """Waits until everything is written, but not for long."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1)
        self._thread.join(timeout)


class _JsonLines:
    def __init__(self, path: epath.Path):
        self._file = path.open("a")

    def __call__(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _write_png(item: tuple[epath.Path, np.ndarray]) -> None:
    from PIL import Image

    path, pixels = item
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")


class Logs:
    """All that a run writes besides checkpoints.

    Args:
      workdir: the run's folder.
      start: the step that the run goes on from; later lines of metrics.jsonl, of a run that was killed,
        are dropped.
      steps: the run's length.
      tensorboard: whether to write TensorBoard files.
      bar: whether to show the progress bar.
    """

    def __init__(self, workdir: Any, start: int, steps: int, tensorboard: bool = True, bar: bool = True):
        self._workdir = epath.Path(workdir)
        self._start, self._steps, self._show = start, steps, bar
        try:
            _drop_later_lines(self._workdir / METRICS, start, start == steps)
        except OSError as error:  # the record may hold steps twice then, which is better than to lose it
            logging.warning("%s can't be tidied and is only added to: %s", METRICS, error)
        self._lines = Sink(METRICS, lambda: _JsonLines(self._workdir / METRICS))
        self._pictures = Sink("samples/", lambda: _write_png)
        self._events = Sink("TensorBoard files", lambda: events.Events(self._workdir)) if tensorboard else None
        self._bar: Any = None

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes metrics. What isn't finite is left out of the files, as JSON has no word for it."""
        finite = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        flags = {k: v for k, v in values.items() if isinstance(v, bool)}
        self._lines.put({"step": step, **finite, **flags})
        if self._events:
            self._events.put(("scalars", step, {k: v for k, v in finite.items() if k not in flags}))

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes each [n, h, w, 3] uint8 array as a grid: samples/NAME-STEP.png, and in TensorBoard."""
        grids = {name: grid(np.asarray(images)) for name, images in pictures.items()}
        for name, pixels in grids.items():
            self._pictures.put((_picture(self._workdir, name, step), pixels))
        if self._events:
            self._events.put(("images", step, {f"samples/{name}": pixels[None] for name, pixels in grids.items()}))

    def progress(self, step: int, **values: str) -> None:
        """Moves the bar to `step`; it starts with the first call, so that time left doesn't count compiling."""
        if not self._show:
            return
        if self._bar is None:
            from tqdm import tqdm

            quiet = {} if sys.stderr.isatty() else {"mininterval": 10.0}
            self._bar = tqdm(total=self._steps, initial=self._start, unit="step", dynamic_ncols=True, **quiet)
        self._bar.update(step - self._bar.n)
        if values:
            self._bar.set_postfix(values, refresh=False)

    def say(self, text: str) -> None:
        """A line on the screen that doesn't break the bar."""
        if not self._show:
            return
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Waits for the writers."""
        if self._bar is not None:
            self._bar.close()
        for sink in (self._lines, self._pictures):
            sink.close()
        if self._events:  # the process that writes may still be starting; it outlives us by what it has to write
            self._events.close(timeout=10.0)


class Silent:
    """`Logs` of a process that leaves writing to process 0."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Nothing."""

    def progress(self, step: int, **values: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def grid(images: np.ndarray, least: int = 64) -> np.ndarray:
    """[n, h, w, 3] as one picture of about as many rows as columns; small pictures enlarged to `least` pixels."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, channels), images.dtype)
    padded[:count] = images
    joined = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    joined = joined.reshape(rows * height, columns * width, channels)
    times = max(1, math.ceil(least / height))
    return joined.repeat(times, axis=0).repeat(times, axis=1)


def _picture(workdir: epath.Path, name: str, step: int) -> epath.Path:
    return workdir / "samples" / f"{name.replace('/', '_')}-{step:07d}.png"


def were_drawn(workdir: Any, step: int) -> bool:
    """Whether a run has pictures of a step."""
    pattern = _picture(epath.Path(workdir), "*", step)
    return any(pattern.parent.glob(pattern.name))


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is of held-out batches."""
    return any(name.startswith("eval/") for name in line)


def read_metrics(workdir: Any) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; [] if it can't be read. A line cut short by a kill is left out."""
    try:
        return _read_lines(epath.Path(workdir) / METRICS)
    except OSError:
        return []


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "step" in value:
                found.append(value)
    return found


def _drop_later_lines(path: epath.Path, start: int, at_the_end: bool) -> None:
    """Leaves the lines up to step `start`: those after it will be written again.

    Also drops the mark of a finished run, which is now to go on for longer, and of one that was stopped
    `at_the_end` the evaluation, which is made again.
    """
    if not path.exists():
        return

    def again(line: Mapping[str, Any]) -> bool:
        evaluated = at_the_end and line["step"] == start and is_evaluation(line)
        return line["step"] > start or line.get(FINISHED) or evaluated

    kept = [line for line in _read_lines(path) if not again(line)]
    draft = path.parent / f".{path.name}.draft"
    draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
    draft.replace(path)


def plot_curves(workdir: Any, png: Any, most: int = 12) -> None:
    """Draws a run's metrics against the step, training and held-out ("eval/") in one panel each.

    Args:
      workdir: of the run; its metrics.jsonl is read.
      png: where to write the picture.
      most: panels at most; losses and accuracies come first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(workdir)
    names: dict[str, None] = dict.fromkeys(
        name.removeprefix("eval/") for line in lines for name in line if name not in ("step", FINISHED)
    )
    shown = sorted(names, key=lambda name: (name != "loss", "loss" not in name, "accuracy" not in name))[:most]
    columns = max(1, min(4, len(shown)))
    figure = Figure(figsize=(4 * columns, 3 * max(1, math.ceil(len(shown) / columns))), layout="constrained")
    FigureCanvasAgg(figure)
    for index, name in enumerate(shown):
        axis = figure.add_subplot(math.ceil(len(shown) / columns), columns, index + 1)
        for key, label in ((name, "training"), (f"eval/{name}", "held out")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else "")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.legend()
    figure.savefig(os.fspath(png))
