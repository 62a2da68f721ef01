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
_PATIENCE = 10.0  # seconds for the bucket to answer


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
        self._folder, self._flag = folder, flag
        self._mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}).encode()
        self._generation = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="muse_jax lease")

    def __enter__(self) -> None:
        try:
            self._store = _store(self._folder)
            self._generation = self._write(self._mine, self._abandoned()) or self._written()
            if not self._generation:
                raise _taken(self._folder, self._flag, self._read().value)
        except ResumeError:
            raise
        except Exception as error:
            raise _unwritable(self._folder, self._flag, error) from error
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        """Gives it back, if the bucket answers soon; else it runs out."""
        self._ended.set()
        self._thread.join(_PATIENCE)
        with contextlib.suppress(Exception):
            self._write(None, self._generation)

    def _read(self) -> Any:
        return self._store.read(LOCK).result(timeout=_PATIENCE)

    def _write(self, value: bytes | None, expected: bytes) -> bytes:
        """Returns the generation that was made; none if what is there is no longer the expected one."""
        return self._store.write(LOCK, value, if_equal=expected).result(timeout=_PATIENCE).generation

    def _written(self) -> bytes:
        """The generation of our own words, if they are there after all: the answer to a write may get lost."""
        now = self._read()
        return now.stamp.generation if now.value == self._mine else b""

    def _abandoned(self) -> bytes:
        """The generation of what is there, nothing or what nobody renews.

        Raises:
          ResumeError: if somebody does.
        """
        found = self._read()
        if found.state == "missing":
            return found.stamp.generation
        logging.warning(
            "%s/%s is of %s; if it isn't renewed in %g seconds, this run goes on there.",
            self._folder, LOCK, _holder(found.value), LEASE,
        )  # fmt: skip
        began = seen = time.monotonic()
        while time.monotonic() < began + LEASE:
            time.sleep(LEASE / 30)
            again = self._read()
            if again.state == "missing":
                break
            if again.stamp.generation != found.stamp.generation:
                raise _taken(self._folder, self._flag, again.value)
            now = time.monotonic()
            if now - seen > LEASE / 10:  # the bucket was slow, perhaps for the holder too: wait anew
                began = now
            seen = now
        return again.stamp.generation

    def _keep(self) -> None:
        pause = RENEWED
        while not self._ended.wait(pause):
            pause = RENEWED
            try:
                made = self._write(self._mine, self._generation) or self._written()
                now = None if made else self._read()
                if now is not None and now.state == "missing":  # somebody has deleted it
                    made = self._write(self._mine, now.stamp.generation)
            except Exception as error:
                logging.warning("%s/%s can't be renewed at the moment: %s", self._folder, LOCK, error)
                pause = RENEWED / 10
                continue
            if self._ended.is_set():
                return
            if not made:
                self._leave(now)
            self._generation = made

    def _leave(self, now: Any) -> None:
        said = (
            f"{self._folder} was taken over by {_holder(now.value)}, which heard nothing of this process for {LEASE:g} "
            "seconds. It ends here, so that no two write there."
        )
        logging.error("%s", said)
        from muse_jax.training import hosts  # brings jax, which conversions need not

        if hosts.several():
            hosts.announce(said)
            hosts.leave(1)
        os._exit(1)


def _store(folder: str) -> Any:
    """Where the folder's objects are. What fails is tried again here: tensorstore would wait longer and longer."""
    import tensorstore  # which Orbax writes to buckets with

    bucket, _, path = folder.removeprefix("gs://").partition("/")
    retries = {"max_retries": 2, "initial_delay": "200ms", "max_delay": "1s"}
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{path.rstrip('/')}/" if path else ""}
    return tensorstore.KvStore.open({**spec, "context": {"gcs_request_retries": retries}}).result(timeout=_PATIENCE)


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
