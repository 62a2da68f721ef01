"""One process, or one run of several, at a time in a folder: a lock of the system's, and in a bucket a lease.

A lock of the system's dies with its process. An object in a bucket doesn't: whoever holds it writes it anew every
`RENEWED` seconds, and who finds it waits for `LEASE` seconds to see whether that still happens. Nobody's clock is
asked, and each write holds only if nobody else wrote in between.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging

from muse_jax.training.resume import ResumeError

RENEWED, LEASE = 15.0, 60.0
LOCK = ".lock"


@contextlib.contextmanager
def held(folder: Any, flag: str = "--workdir") -> Iterator[None]:
    """Holds the folder for this process. In object stores other than Google's nothing is held.

    Args:
      folder: local, or gs://...
      flag: which names it, for messages.

    Raises:
      ResumeError: naming the host and process that hold it.
    """
    name = os.fspath(folder)
    if name.startswith("gs://"):
        with _Lease(name, flag):
            yield
    elif "://" in name:
        yield
    else:
        with _locked(pathlib.Path(name), flag):
            yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path, flag: str) -> Iterator[None]:
    import fcntl

    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, flag, error) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(folder, flag, path.read_bytes()) from error
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield
    finally:
        os.close(file)


class _Lease:
    """The object .lock of a folder in a bucket, while it is this process's."""

    def __init__(self, folder: str, flag: str):
        import tensorstore  # which Orbax writes to buckets with

        self._folder, self._flag = folder, flag
        self._mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
        try:
            self._store = tensorstore.KvStore.open(f"{folder.rstrip('/')}/").result()
        except Exception as error:
            raise _unwritable(folder, flag, error) from error
        self._generation = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="muse_jax lease")

    def __enter__(self) -> None:
        try:
            before = self._abandoned()
            self._generation = self._write(self._mine, before.stamp.generation)
            if not self._generation:
                raise _taken(self._folder, self._flag, self._read().value)
        except ResumeError:
            raise
        except Exception as error:
            raise _unwritable(self._folder, self._flag, error) from error
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._write(None, self._generation)

    def _read(self) -> Any:
        return self._store.read(LOCK).result()

    def _write(self, value: str | None, expected: bytes) -> bytes:
        """Returns the generation that was made; none if what is there is no longer the expected one."""
        return self._store.write(LOCK, value, if_equal=expected).result().generation

    def _abandoned(self) -> Any:
        """What is there, which nobody renews.

        Raises:
          ResumeError: if somebody does.
        """
        found = self._read()
        if found.state == "missing":
            return found
        logging.warning(
            "%s/%s is of %s; if it isn't renewed in %g seconds, this run goes on there.",
            self._folder, LOCK, _holder(found.value), LEASE,
        )  # fmt: skip
        until = time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(LEASE / 30)
            again = self._read()
            if again.state == "missing":
                return again
            if again.stamp.generation != found.stamp.generation:
                raise _taken(self._folder, self._flag, again.value)
        return found

    def _keep(self) -> None:
        while not self._ended.wait(RENEWED):
            try:
                made = self._write(self._mine, self._generation)
                if not made:  # an answer that got lost leaves our own words there
                    now = self._read()
                    made = now.stamp.generation if now.value == self._mine.encode() else b""
            except Exception as error:  # an outage; others wait longer than it takes to be noticed
                logging.warning("%s/%s can't be renewed at the moment: %s", self._folder, LOCK, error)
                continue
            if not made:
                logging.error(
                    "%s was taken over by %s, which heard nothing of this process for %g seconds. It ends here, so "
                    "that no two write there.", self._folder, _holder(now.value), LEASE,
                )  # fmt: skip
                os._exit(1)
            self._generation = made


def _taken(folder: Any, flag: str, said: bytes) -> ResumeError:
    return ResumeError(f"another run is at work in {folder}: {_holder(said)}. Stop it, or choose another {flag}.")


def _unwritable(folder: Any, flag: str, error: Exception) -> ResumeError:
    return ResumeError(f"can't write to {folder} ({error}); choose another {flag}.")


def _holder(said: bytes) -> str:
    try:
        holder = json.loads(said)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which it is"
