"""SIGTERM and Ctrl-C: the run saves and ends at the next place where it may.

The handler only sets a flag, so it may come at any time: the flag is read at every step, while
waiting for data, between the batches of an evaluation, and after compiling, drawing samples and
saving, each of which is finished first. More signals of the same kind change nothing, except that a
second Ctrl-C ends the run at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from muse_jax.training import hosts


class Stopped(Exception):
    """The run was asked to stop, and what it had trained is saved.

    Attributes:
      saved: True; what it had trained is on disk.
      exit_code: 128 + the signal's number, as shells have it: 143 after SIGTERM, 130 after Ctrl-C.
    """

    saved = True

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step}, which is saved; start again to go on")
        self.exit_code = 128 + number
        self.step = step


class Signals:
    """Remembers the first signal that came."""

    def __init__(self) -> None:
        self.number: int | None = None

    def handle(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    @property
    def came(self) -> bool:
        return self.number is not None

    def begin(self, step: int) -> None:
        """Says at which step the run begins."""

    def at(self, step: int) -> bool:
        """Whether to stop at this step; to be asked at every step."""
        return self.came


class AgreedSignals(Signals):
    """Signals to any of several processes: all stop at the same step.

    jax.distributed's preemption service has SIGTERM's handler. Processes tell each other of a notice and
    agree on a step that none has begun, which is why only `at` may find out, and nothing in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self._interrupted = False

    def handle(self, number: int, _frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)

    def begin(self, step: int) -> None:
        # What was agreed on before anyone had said a step is step 1, which a run that goes on doesn't pass.
        self.at(1)
        self.at(step)

    def at(self, step: int) -> bool:
        if not self.came and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.came


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Handles SIGTERM and SIGINT within; outside the main thread nothing is handled.

    Once a signal has come the handlers stay, so that another one doesn't cut the process's end short.
    """
    several = hosts.several()
    signals = AgreedSignals() if several else Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handled = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signals.handle) for number in handled}
    try:
        yield signals
    finally:
        if not signals.came:
            for number, handler in before.items():
                signal.signal(number, handler)
