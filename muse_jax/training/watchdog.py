"""A thread that ends a run which waits in vain, and says who waits for what.

Started before anything is read or restored. The run says which phase it enters; each has a deadline in the
config's `deadlines`. In a run of several processes a second thread tells the others where this one is, and
hears whether another one failed or says nothing any more, which then ends this one. It asks process 0, and may
wait for it for ever if that is frozen: the first thread never asks anybody.

Time for which the whole process was stopped, with Ctrl-Z or with its machine, counts as no waiting: the
thread, which didn't run either, notices and lets the deadline begin anew.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from muse_jax.specs import DeadlinesSpec
from muse_jax.training import hosts

STUCK = 124  # exit code, as `timeout` has it
FAILED = 1
DONE = "done"  # the phase of a process that needs no others any more
_BEAT = 1.0  # seconds between looks at the clock
_ASKED = 3.0  # seconds for what the others are asked or told at the end
_LATE = 2.0  # seconds that a look may come late before the whole process counts as having been stopped


class Watchdog:
    """Use as a context manager around the run; see `enter`.

    Args:
      deadlines: of the phases.
      final: whether this process needs no others once the context is left.
    """

    def __init__(self, deadlines: DeadlinesSpec, final: bool = True):
        self._deadlines, self._final = deadlines, final
        # Phase, step, since when, and the seconds that were spent in the phase "data" before.
        self._at: tuple[str, int, float, float] = ("start", 0, time.monotonic(), 0.0)
        self._told: dict[int, dict[str, Any]] = {}  # what each process last said; process 0 knows
        self._told_before = self._told
        self._awake = time.monotonic()  # since when the process has not been stopped (Ctrl-Z, a suspended machine)
        self._heard: dict[int, tuple[float | None, float]] = {}  # the last sign of life of each, and since when
        self._answered = self._began = time.monotonic()  # when process 0 last answered
        self._news: str | None = None  # why this process has to end
        self._stop = threading.Event()
        self._main = threading.get_ident()
        run = {"muse_jax watchdog": self._run, "muse_jax signs of life": self._exchange}
        self._threads = [threading.Thread(target=target, daemon=True, name=name) for name, target in run.items()]

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=5)
        if self._final and hosts.several():
            _soon(lambda: hosts.say({**self._status(), "phase": DONE}))

    def enter(self, phase: str, step: int) -> None:
        """Says that a phase of `DeadlinesSpec` begins, at this step."""
        now = time.monotonic()
        self._at = (phase, step, now, self._waited(now))

    def slowest_wait(self) -> tuple[float, str]:
        """The largest share of the time since the last call that any process waited for data, and which one did.

        To within a beat. Process 0 knows it from what all say anyway; 0 and "" where nothing has been heard since.
        """
        told, before, self._told_before = self._told, self._told_before, self._told
        shares = {}
        for i in before.keys() & told.keys():
            seconds = told[i]["beat"] - before[i]["beat"]
            if seconds > 0:
                shares[i] = (told[i]["waited"] - before[i]["waited"]) / seconds
        if not shares:
            return 0.0, ""
        slowest = max(shares, key=shares.__getitem__)
        return shares[slowest], _named(slowest, told)

    def described(self) -> str:
        """The phase and step, in words."""
        return f"{self._at[0]!r} at step {self._at[1]}"

    def _waited(self, now: float) -> float:
        phase, _, since, before = self._at
        return before + (now - since if phase == "data" else 0.0)

    def _run(self) -> None:
        while not self._wait():
            phase, step, since, _ = self._at
            seconds = self._seconds(since)
            news = self._news or self._unanswered()
            if news and not self._stop.is_set():
                _soon(lambda news=news: hosts.announce(news))
                self._end(f"{news}. Start all processes again to go on from the newest checkpoint.", FAILED)
            deadline = getattr(self._deadlines, phase)
            if 0 < deadline < seconds and not self._stop.is_set():
                self._end(self._report(phase, step, seconds, deadline), STUCK)

    def _exchange(self) -> None:
        """Tells the others of this process, and hears of them. Asks no more once there is news."""
        while not self._news and not self._stop.is_set():
            if hosts.several():
                with contextlib.suppress(Exception):  # counted as no answer
                    hosts.say(self._status())
                    self._news = hosts.announced() or self._unheard()
                    self._answered = time.monotonic()
            self._stop.wait(_BEAT)

    def _unanswered(self) -> str | None:
        """What is wrong if process 0, through which all speak, no longer answers."""
        limit = self._deadlines.heartbeat
        if self._seconds(self._answered) <= limit or not hosts.several() or hosts.leads():
            return None
        return f"process 0 is gone or can't be reached: no answer from it for {limit:g} s (deadlines.heartbeat)"

    def _wait(self) -> bool:
        """Waits for a beat; returns whether the run is over. If the process was stopped meanwhile, time begins anew."""
        began = time.monotonic()
        over = self._stop.wait(_BEAT)
        now = time.monotonic()
        if now - began > _BEAT + _LATE:
            self._awake = now
            self._heard.clear()  # the others may have been stopped with it
        return over

    def _seconds(self, since: float) -> float:
        """Of a phase that began then, without what came before the process was last stopped."""
        return time.monotonic() - max(since, self._awake)

    def _unheard(self) -> str | None:
        """Names a process that says nothing any more; process 0 looks after the others."""
        if not hosts.leads():
            return None
        now, limit = time.monotonic(), self._deadlines.heartbeat
        self._told = hosts.statuses()
        for index in range(jax.process_count()):
            told = self._told.get(index, {})
            beat, heard = self._heard.get(index, (None, max(self._began, self._awake)))
            if beat != told.get("beat"):
                self._heard[index] = (told["beat"], now)
            elif told.get("phase") != DONE and now - heard > limit:
                last = f", last in {told['phase']!r} at step {told['step']}" if told else ""
                return (
                    f"{_named(index, self._told)} is gone or can't be reached: nothing heard of it for {limit:g} s "
                    f"(deadlines.heartbeat){last}"
                )
        return None

    def _status(self) -> dict[str, Any]:
        phase, step, since, _ = self._at
        waited = self._waited(time.monotonic())
        return {"phase": phase, "step": step, "seconds": self._seconds(since), "where": self._where(), "waited": waited}

    def _where(self) -> str:
        """The innermost call of the main thread."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "no code"
        line = traceback.extract_stack(frame)[-1]
        return f"{os.path.basename(line.filename)}:{line.lineno} {line.name}"

    def _report(self, phase: str, step: int, seconds: float, deadline: float) -> str:
        lines = [
            f"{phase!r} at step {step} has taken {seconds:.0f} s; deadlines.{phase} allows {deadline:g} s. "
            "Who waits where:"
        ]
        told = {0: {"host": "this one", "pid": os.getpid(), **self._status()}}
        if hosts.several():
            _soon(lambda: hosts.say(self._status()))
            told = _soon(hosts.statuses) or told
        for index, at in sorted(told.items()):
            lines.append(
                f"  process {index} ({at['host']}, pid {at['pid']}): {at['phase']!r} at step {at['step']} "
                f"for {at['seconds']:.0f} s, in {at['where']}"
            )
        last = max(at["step"] for at in told.values())
        behind = [i for i, at in sorted(told.items()) if at["phase"] != "step" or at["step"] < last]
        if 0 < len(behind) < len(told):
            lines.append(f"The others wait for {', '.join(f'process {i}' for i in behind)}.")
        return "\n".join([*lines, "Start again to go on from the newest checkpoint."])

    def _end(self, text: str, code: int) -> NoReturn:
        print(f"watchdog: {text}", file=sys.stderr, flush=True)
        if code == STUCK:
            faulthandler.dump_traceback(all_threads=True)
            if hosts.several():
                _soon(lambda: hosts.announce(f"watchdog: {text}"))
        if hosts.several():
            hosts.leave(code)
        os._exit(code)


def _named(index: int, told: Mapping[int, Mapping[str, Any]]) -> str:
    """A process, with what is known of it."""
    return f"process {index} ({told[index]['host']}, pid {told[index]['pid']})" if index in told else f"process {index}"


def _soon(function: Callable[[], Any]) -> Any:
    """What a function that asks process 0 returns, or None if it has no answer by then."""
    found = []

    def call() -> None:
        with contextlib.suppress(Exception):
            found.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_ASKED)
    return found[0] if found else None
