"""Processes that load: what Grain doesn't notice about them.

Grain says so when one dies with an error. One that ended as if all were well, or that was stopped
(SIGSTOP, a debugger, a frozen container), would be waited for without end; and those of a run that was
killed would load on.
"""

import contextlib
import functools
import os
import pathlib
import queue
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_LOOK = 1.0  # seconds between looks at the processes while there is no batch
_LOOKS = 3  # looks in a row that must find the same trouble: Grain may be about to tell it, or a stop be short


class Processes:
    """The loading processes of one iterator.

    Attributes:
      started: for Grain to call in each of them (`worker_init_fn`).
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="muse_jax-loading-")  # of files whose names are process ids
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.started: Callable[[int, int], None] = functools.partial(_started, self._folder, os.getpid())

    def next(self, iterator: Iterator[Any]) -> Any:
        """The iterator's next element.

        Raises:
          RuntimeError: if a process has ended or is stopped, from Grain or from here.
        """
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_fetch, args=(iterator, answer), daemon=True, name="muse_jax loading").start()
        looks = 0
        while True:
            try:
                element, error = answer.get(timeout=_LOOK)
            except queue.Empty:
                trouble = self._trouble()
                looks = looks + 1 if trouble else 0
                if looks == _LOOKS:
                    raise RuntimeError(trouble) from None
                continue
            if error is not None:
                raise error
            return element

    def _ids(self) -> list[int]:
        return [int(path.name) for path in pathlib.Path(self._folder).iterdir()]

    def _trouble(self) -> str | None:
        for process in self._ids():
            state = _state(process)
            if state in ("T", "Z", "X"):
                return f"loading process {process} {'is stopped' if state == 'T' else 'has ended'}"
        return None

    def kill(self) -> None:
        """Ends all of them, stopped ones too."""
        for process in self._ids():
            if _state(process) not in ("Z", "X"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def _fetch(iterator: Iterator[Any], answer: "queue.SimpleQueue[Any]") -> None:
    try:
        answer.put((next(iterator), None))
    except BaseException as error:  # StopIteration too
        answer.put((None, error))


def _started(folder: str, parent: int, _index: int, _count: int) -> None:
    """In a loading process: says that it is there, and ends it soon after its parent."""
    pathlib.Path(folder, str(os.getpid())).touch()

    def guard() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=guard, daemon=True, name="muse_jax guard").start()


def _state(process: int) -> str:
    """Linux's letter for a process: R and S are well, T stopped, Z ended but not waited for; X: there is none."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "X" if os.path.isdir("/proc/self") else "S"  # elsewhere nothing can be told
    return stat.rpartition(")")[2].split()[0]
