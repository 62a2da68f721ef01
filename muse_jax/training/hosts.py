"""Several processes as one run, on one machine or on the hosts of a pod.

What must be the same everywhere (which checkpoint is restored, whether a save went well) is decided
through jax.distributed's coordination service and not by collectives of the devices: a process that
waits here can still be told that another one is gone. With one process every function here only calls
what it was given.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

_PATIENCE = 24 * 3600 * 1000  # milliseconds; the watchdog's deadlines come long before
_NEVER = 10**6  # seconds
_KEYS = "muse_jax"
_BEAT = 1.0  # seconds between two signs of life

_count = 0  # exchanges so far; every process makes the same ones in the same order


class HostError(RuntimeError):
    """Another process of this run failed, is gone, or isn't part of the same run."""


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    join_seconds: float = 600,
    heartbeat_seconds: float = 60,
) -> None:
    """Joins this process to the others of its run; call it before anything asks jax for devices.

    On the hosts of a TPU slice (TPU VMs, GKE) everything is found out from the environment. Elsewhere
    there is one process, unless the arguments name several.

    Args:
      coordinator: host:port of process 0, which must be free there.
      processes, process: how many there are, and which one this is, from 0.
      join_seconds: how long to wait for the others; 0: for ever.
      heartbeat_seconds: after which a silent process counts as dead, by half a minute later at the latest.

    Raises:
      ValueError: if some of the three are given and not all, or can't be.
      HostError: if the others can't be joined. If one does not come in time this process is ended, with exit code 1
        and a message: jax would abort it without one.
    """
    given = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 and not on_tpu_slice(os.environ):
        return
    if 0 < len(missing) < 3:
        raise ValueError(f"{', '.join(sorted(set(given) - set(missing)))} given without {', '.join(missing)}.")
    if not missing:
        _check(coordinator, processes, process)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who = "this TPU slice" if missing else f"process {process} of {processes}, coordinator {coordinator}"
    late = threading.Timer(join_seconds or _NEVER, _nobody_came, (who, join_seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=int(join_seconds or _NEVER) + 60,  # beyond ours
            # The watchdog is to be sooner: it can say more.
            heartbeat_timeout_seconds=int(heartbeat_seconds) + 30,
            shutdown_timeout_seconds=int(heartbeat_seconds) + 30,
        )
    except RuntimeError as error:
        raise HostError(f"the processes of this run could not be joined ({who}): {_first_line(error)}") from error
    finally:
        late.cancel()


def _nobody_came(who: str, seconds: float) -> None:
    print(
        f"HostError: the processes of this run did not all come within {seconds:g} s ({who}). Is each of them started, "
        "with the same coordinator and number of processes, and can their machines reach each other? deadlines.start "
        "sets how long to wait.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread waits in jax, which nothing can interrupt


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator is {coordinator!r}; expected host:port, as in 10.0.0.1:8476.")
    if processes < 1:
        raise ValueError(f"num_processes is {processes}; expected at least 1.")
    if not 0 <= process < processes:
        raise ValueError(f"process_id is {process}; expected 0 to {processes - 1}.")


def on_tpu_slice(environment: Mapping[str, str]) -> bool:
    """Whether this host is one of a TPU slice: of GKE's, which says so in the environment, or a TPU VM."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", "")).split(",")
    if len(hosts) > 1 or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    if "TPU_SKIP_MDS_QUERY" in environment:  # a host by itself, such as a notebook's
        return False
    # A TPU VM: jax asks the machine's metadata for the others. Of one host alone it makes a run of one process.
    from jax._src.clusters import GceTpuCluster

    return GceTpuCluster.is_env_present()


def several() -> bool:
    """Whether the run has more than one process. Starts no backend where nothing was joined."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leads() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return not several() or jax.process_index() == 0


def everywhere(what: str, function: Callable[[], Any], otherwise: type[Exception] = HostError) -> list[Any]:
    """Calls `function` in every process and returns what each returned, process 0's first.

    Every process must call this, in the same order. If the function raises anywhere, this raises
    everywhere: that error where it was, and `otherwise`, which names it, where it wasn't.

    Args:
      what: is done, for messages.
      function: returns a JSON value.
      otherwise: the class of the error in processes that had none.
    """
    if not several():
        return [function()]
    own, said = None, {}
    try:
        said["value"] = function()
    except Exception as error:
        own, said["error"] = error, f"{type(error).__name__}: {_first_line(error)}"
    answers = _exchange(said)
    if own is not None:
        raise own
    failed = [f"process {i} ({a['host']}): {a['error']}" for i, a in enumerate(answers) if "error" in a]
    if failed:
        raise otherwise(f"{what} failed in {'; '.join(failed)}")
    return [answer["value"] for answer in answers]


def from_leader(what: str, function: Callable[[], Any], otherwise: type[Exception] = HostError) -> Any:
    """Calls `function` in process 0 and returns what it returned in every process; errors as `everywhere`."""
    return everywhere(what, function if leads() else lambda: None, otherwise)[0]


def check_same(what: str, value: Mapping[str, Any]) -> None:
    """Raises HostError, naming the keys, where `value` isn't that of process 0."""

    def compare() -> None:
        changed = sorted(key for key in {*first, *value} if first.get(key) != value.get(key))
        if changed:
            raise HostError(f"{what} is not that of process 0: {', '.join(changed)}; start all with the same command.")

    if several():
        value = json.loads(json.dumps(value))
        first = from_leader(what, lambda: value)
        everywhere(what, compare)


def _exchange(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    global _count
    _count += 1
    folder = f"{_KEYS}/{_count}"
    client = _client()
    try:
        client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps({**said, "host": socket.gethostname()}))
        client.wait_at_barrier(folder.replace("/", "-"), _PATIENCE)
        found = dict(client.key_value_dir_get(folder))
        return [json.loads(found[f"{folder}/{index}"]) for index in range(jax.process_count())]
    except jax.errors.JaxRuntimeError as error:
        raise HostError(f"the other processes no longer answer: {_first_line(error)}") from error


def _client() -> Any:
    from jax._src import distributed  # jax has no public name for it; Orbax takes it from here too

    return distributed.global_state.client


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else ""


# ------------------------------------------------------------------------------------ signs of life


def say(status: Mapping[str, Any]) -> None:
    """Tells the others where this process is; the watchdog calls it every `_BEAT` seconds."""
    told = {"host": socket.gethostname(), "pid": os.getpid(), "beat": time.monotonic(), **status}
    _client().key_value_set(f"{_KEYS}/at/{jax.process_index()}", json.dumps(told), allow_overwrite=True)


def statuses() -> dict[int, dict[str, Any]]:
    """{process: what it last said}."""
    found = dict(_client().key_value_dir_get(f"{_KEYS}/at"))
    return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found.items()}


def silent() -> list[str]:
    """Processes that say nothing while one listens for a few beats, in words."""
    before = statuses()
    time.sleep(4 * _BEAT)
    after = statuses()
    return [
        f"process {index} ({status['host']}, pid {status['pid']})"
        for index, status in sorted(after.items())
        if status["beat"] == before.get(index, {}).get("beat") and index != jax.process_index()
    ]


def announce(text: str) -> None:
    """Tells the others that this process fails, and why; the first to say so is heard."""
    try:
        told = {"process": jax.process_index(), "host": socket.gethostname(), "text": text}
        _client().key_value_set(f"{_KEYS}/failed/first", json.dumps(told), allow_overwrite=False)
    except jax.errors.JaxRuntimeError:
        return


def announced() -> str | None:
    """What another process that failed has said, or None."""
    found = dict(_client().key_value_dir_get(f"{_KEYS}/failed"))
    told = [json.loads(value) for value in found.values()]
    told = [one for one in told if one["process"] != jax.process_index()]
    return f"process {told[0]['process']} ({told[0]['host']}) failed: {told[0]['text']}" if told else None


@contextlib.contextmanager
def telling(doing: Callable[[], str]) -> Iterator[None]:
    """Tells the other processes of an error within, and finds out whose fault one of a collective is.

    Args:
      doing: what this process does at the moment, in words.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if several() and not getattr(error, "saved", False):
            text = f"{type(error).__name__}: {_first_line(error)}"
            if isinstance(error, jax.errors.JaxRuntimeError):
                text = f"{doing()} failed, since {_missing()} ({_first_line(error)})"
                announce(text)
                raise HostError(f"{text}. Start all processes again to go on from the newest checkpoint.") from error
            announce(text)
        raise


def _missing() -> str:
    try:
        return f"{', '.join(silent()) or 'another process'} is gone or can't be reached"
    except jax.errors.JaxRuntimeError:
        return "process 0 is gone or can't be reached"


def leave(code: int) -> NoReturn:
    """Ends this process; in a run of several without waiting for the others, of which some may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not several():
        sys.exit(code)
    if leads():
        time.sleep(3 * _BEAT)  # the others hear through this process why it ends
    os._exit(code)
