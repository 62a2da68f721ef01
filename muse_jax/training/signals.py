"""SIGTERM and Ctrl-C: the run saves and ends at the next place where it may.

The handler only sets a flag, so it may come at any time: the flag is read at every step, while
waiting for data, between the batches of an evaluation, and after compiling, drawing samples and
saving, each of which is finished first. More signals of the same kind change nothing, except that a
second Ctrl-C ends the run at once.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and what it had trained is saved.

    Attributes:
      exit_code: 128 + the signal's number, as shells have it: 143 after SIGTERM, 130 after Ctrl-C.
    """

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


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Handles SIGTERM and SIGINT within; outside the main thread nothing is handled.

    Once a signal has come the handlers stay, so that another one doesn't cut the process's end short.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        if not signals.came:
            for number, handler in before.items():
                signal.signal(number, handler)
