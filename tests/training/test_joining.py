"""What each process finds out by itself: whether there are others, what it reads, and that it is stuck."""

import signal
import socket
import subprocess
import sys
import time
import typing

import jax
import pytest

from muse_jax import specs
from muse_jax.training import hosts, sharding


@pytest.mark.parametrize(
    ("environment", "slice_"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, False),  # as for compiling ahead
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),  # GKE
        ({"TPU_PROCESS_ADDRESSES": "host-0:8471,host-1:8471"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1", "JAX_PLATFORMS": "tpu,cpu"}, True),
    ],
)
def test_a_slice_is_told_by_its_environment(environment, slice_):
    assert hosts.on_tpu_slice(environment) is slice_


def test_one_process_is_joined_only_where_there_are_more(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: joined.append((args, options)))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    hosts.start()
    assert not joined
    hosts.start("localhost:1234", 2, 1, join_seconds=50.0, heartbeat_seconds=20.0)
    ((args, options),) = joined
    assert args == ("localhost:1234", 2, 1)
    assert options["initialization_timeout"] > 50, "ours is the first to end the wait"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    hosts.start()
    assert joined[1][0] == (None, None, None)  # jax finds out
    with pytest.raises(ValueError, match="coordinator given without num_processes, process_id"):
        hosts.start("localhost:1234")
    assert len(joined) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("localhost:1234", 2, 2), "process_id is 2; expected 0 to 1"),
        (("localhost:1234", 0, 0), "num_processes is 0; expected at least 1"),
        (("localhost", 2, 0), "coordinator is 'localhost'; expected host:port"),
        ((":1234", 2, 0), "expected host:port"),
        (("localhost:99999", 2, 0), "expected host:port"),
    ],
)
def test_what_cannot_be_joined_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        hosts.start(*given)


@pytest.mark.parametrize("process", [0, 1])
def test_who_waits_in_vain_is_ended_with_a_message(process):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = f"from muse_jax.training import hosts; hosts.start('localhost:{port}', 2, {process}, join_seconds=2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert f"did not all come within 2 s (process {process} of 2, coordinator localhost:{port})" in done.stderr
    assert "Fatal" not in done.stderr


class Device(typing.NamedTuple):
    process_index: int
    id: int


class Laid(jax.sharding.NamedSharding):
    """A sharding of which only is known which rows each process's devices hold."""

    def __init__(self, rows):
        super().__init__(sharding.make_mesh(specs.MeshSpec(1, 1, 1)), jax.sharding.PartitionSpec())
        self._rows = rows  # [(process, first, end)]

    def devices_indices_map(self, _shape):
        return {Device(process, index): (slice(first, end),) for index, (process, first, end) in enumerate(self._rows)}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([(0, 0, 4), (1, 4, 8)], [(0, 2), (1, 2)]),
        ([(0, 0, 2), (1, 2, 4), (0, 4, 6), (1, 6, 8)], [(0, 2), (1, 2)]),  # a host's chips are no neighbours in a mesh
        ([(1, 0, 4), (0, 4, 8)], [(1, 2), (0, 2)]),
        ([(0, 0, 8), (1, 0, 8)], [(0, 1), (0, 1)]),  # `tensor` spans both: each needs every row
        ([(0, 0, 4), (1, 0, 4), (2, 4, 8), (3, 4, 8)], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(rows, parts, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: len(parts))
    for process, expected in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.process_part(Laid(rows), 8) == expected


def test_parts_that_overlap_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(specs.SpecError, match="no division into equal parts"):
        sharding.process_part(Laid([(0, 0, 6), (1, 4, 8)]), 8)


def test_a_mesh_without_a_process_is_refused_in_every_process(monkeypatch):
    mesh = sharding.make_mesh(specs.MeshSpec(1, 1, 1))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "device_count", lambda: 12)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with pytest.raises(specs.SpecError, match="takes 1 of the 12 devices and none of processes 1, 2; set one of"):
            sharding.process_part(sharding.batch_sharding(mesh, specs.RULES), 8)


def test_a_phase_that_lasts_too_long_ends_the_process_and_is_named():
    program = (
        "import time; from muse_jax.specs import DeadlinesSpec; from muse_jax.training.watchdog import Watchdog\n"
        "def waiting(): time.sleep(100)\n"
        "with Watchdog(DeadlinesSpec(save=1.0)) as watch:\n"
        "    watch.enter('step', 6); time.sleep(1.5); watch.enter('save', 7); waiting()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 124
    assert "'save' at step 7 has taken" in done.stderr
    assert "deadlines.save allows 1 s" in done.stderr
    assert "<string>:2 waiting" in done.stderr
    assert "Thread 0x" in done.stderr  # the stacks of all threads


def test_time_for_which_the_process_was_stopped_is_not_held_against_it():
    program = (
        "import time; from muse_jax.specs import DeadlinesSpec; from muse_jax.training.watchdog import Watchdog\n"
        "with Watchdog(DeadlinesSpec(step=3.0)) as watch:\n"
        "    watch.enter('step', 6); print('waits', flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        went_on = time.monotonic()
        assert process.wait(timeout=60) == 124, "it is still watched"
        assert time.monotonic() - went_on > 2.5
