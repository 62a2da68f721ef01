"""The way of batches to the devices: a thread that loads, shards and holds a few ready."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Sharding

from muse_jax.training import sharding as shardings
from muse_jax.training.signals import Signals

_DEPTH = 2  # batches on the devices beside the one in use
_POLL = 0.1  # seconds between looks at the signals while there is no batch


class DataError(RuntimeError):
    """The data can't be opened, the batches ended, or a batch isn't like the others."""


class Feed:
    """Batches on the devices, in order.

    Loading runs in a thread because a loader may wait for long, and a run that waits must still
    notice SIGTERM.
    """

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], sharding: Sharding, signals: Signals):
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=_DEPTH)
        self._batches = batches
        self._stop = threading.Event()
        self._signals = signals
        self._sharding = sharding
        self._thread = threading.Thread(target=self._fill, daemon=True, name="muse_jax feed")
        self._thread.start()

    def _fill(self) -> None:
        try:
            for batch in self._batches:
                self._put((shardings.put(dict(batch), self._sharding), np.asarray(batch.get("example_id", ()))))
                if self._stop.is_set():
                    return
            self._put(DataError("the batches ended before the run did; a loader must go on without end."))
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL)
                return
            except queue.Full:
                continue

    def get(self) -> tuple[Any, np.ndarray] | None:
        """The next batch on the devices and its example ids; None if a signal came while there was none."""
        while not self._signals.came:
            try:
                item = self._ready.get(timeout=_POLL)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def close(self) -> None:
        """Ends the thread, and the loader if it can be closed. A loader that hangs is left behind."""
        self._stop.set()
        self._thread.join(timeout=2)
        if not self._thread.is_alive() and hasattr(self._batches, "close"):
            self._batches.close()
