"""TensorBoard files, written through clu by a process of its own.

clu's writer imports TensorFlow: seconds of start-up, hundreds of megabytes, and native messages that
no setting turns off. In another process none of it is the training's: one is started with the first
metrics, serves all runs of this process, and ends when its standard input does, however we end.

This file is both sides: `Events` sends, and run as a program it receives.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

_FLUSH = "flush"


class Events:
    """Sends metrics and pictures for one folder. Not for several threads."""

    _process: subprocess.Popen[bytes] | None = None
    _lock = threading.Lock()

    def __init__(self, folder: Any):
        self._folder = os.fspath(folder)

    def __call__(self, item: tuple[str, int, Mapping[str, Any]]) -> None:
        """Sends ("scalars" or "images", step, values).

        Raises:
          OSError: if the process is gone.
        """
        self._send((self._folder, *item))

    def close(self) -> None:
        """Waits until everything is in the files."""
        with self._lock:
            process = Events._process
        if process is not None and process.poll() is None:
            self._send((self._folder, _FLUSH, 0, {}))
            process.stdout.readline()

    def _send(self, message: tuple[Any, ...]) -> None:
        with self._lock:
            if Events._process is None:
                Events._process = subprocess.Popen(
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                    start_new_session=True,  # Ctrl-C is for the training, which then ends us
                )
            stream = Events._process.stdin
        pickle.dump(message, stream)
        stream.flush()


def receive() -> None:
    """Writes what comes on standard input, and answers each "flush" with a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from clu.metric_writers import SummaryWriter

    writers: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            folder, kind, step, values = pickle.load(sys.stdin.buffer)
            if folder not in writers:
                writers[folder] = SummaryWriter(folder)
            if kind != _FLUSH:
                getattr(writers[folder], f"write_{kind}")(step, values)
                continue
            writers.pop(folder).close()
            print("written", flush=True)
    for writer in writers.values():
        writer.close()


if __name__ == "__main__":
    receive()
