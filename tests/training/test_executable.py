"""Which program a run's steps are, across restarts; and the room on devices, before the first step."""

import dataclasses
import doctest
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
import toys

from muse_jax import specs
from muse_jax.training import executable, logs, reading, sharding

BUDGET = 10 * 2**20
FLAT = {"optimizer.schedule": "constant"}


def traced_from(path, line, expression):
    """A lowered program whose source is said to stand there."""
    names = {"jnp": jnp}
    exec(compile("\n" * line + f"def step(x): return {expression}", path, "exec"), names)
    return jax.jit(names["step"]).lower(jnp.ones((4, 4)))


def test_a_program_is_known_by_what_is_computed_and_not_by_where_it_is_written():
    here, there, other = (
        traced_from("/here/step.py", 0, "jnp.tanh(x) @ x"),
        traced_from("/there/other{1}.py", 7, "jnp.tanh(x) @ x"),
        traced_from("/here/step.py", 0, "jnp.sinh(x) @ x"),
    )
    mesh = sharding.make_mesh(specs.MeshSpec())
    known = [executable.identity(lowered, {}, mesh) for lowered in (here, there, other)]
    assert here.as_text(debug_info=True) != there.as_text(debug_info=True)
    assert known[0] == known[1]
    assert executable.difference(known[0], known[2]) == "the program"
    assert executable.difference(known[0], executable.identity(here, {"xla_some": 1}, mesh)) == (
        "options none -> {'xla_some': 1}"
    )


KNOWN_AS = """
import toys
from muse_jax import specs
from muse_jax.training import executable, sharding, step

run = toys.spec(**{"mesh": specs.MeshSpec(2, 2, 1)})
task = toys.Masked()
program = step.Program(run, task, sharding.make_mesh(run.mesh), task.frozen())
lowered = program.lower_train(program.abstract_batch(toys.batch_of(0, run.train.batch_size)))
print(executable.identity(lowered, program.options, program.mesh)["program"])
"""


def test_processes_know_a_program_of_several_devices_by_the_same():
    """Or each restart would warn. What the compiler makes of such a program differs in the order of instructions."""
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(pathlib.Path(toys.__file__).parent)}
        command = [sys.executable, "-c", KNOWN_AS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.strip())
    assert len(found[0]) == 16
    assert found[0] == found[1]


def test_the_examples_of_docstrings():
    found = doctest.testmod(executable)
    assert found.attempted >= 2
    assert not found.failed


def meta_of(workdir, step):
    return reading.read_meta(reading.checkpoints_in(workdir) / str(step))


def go_on(workdir, task=None, **changes):
    """Eight more steps, whatever there were."""
    return toys.train(toys.spec(**{**FLAT, "train.steps": 16, **changes}), workdir, task)


def otherwise(what):
    return (
        f"from step 8 on, steps are compiled otherwise than before ({what}): the run goes on, but not bit for bit as "
        "without the change"
    )


def test_the_same_program_goes_on_without_a_word(tmp_path, caplog):
    class Again(toys.Masked):
        """Compiled anew: of one class, the tests share what is compiled."""

    toys.train(toys.spec(**FLAT), tmp_path)
    before = meta_of(tmp_path, 8)["compiled"]
    go_on(tmp_path, Again())
    assert caplog.messages == []
    assert meta_of(tmp_path, 16)["compiled"] == before
    assert before["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert len(before["program"]) == 16


class Doubled(toys.Masked):
    def loss(self, *args):
        return jax.tree.map(lambda x: x * 2, super().loss(*args))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task", "the program"),
        ("jaxlib", f"jaxlib {jaxlib.__version__} -> 99.0"),
        ("flags", "LIBTPU_INIT_ARGS none -> --xla_some=1"),
        ("mesh", "mesh {'data': 1, 'fsdp': 1, 'tensor': 1} -> {'data': 2, 'fsdp': 1, 'tensor': 1}"),
    ],
)
def test_another_program_goes_on_with_one_warning(tmp_path, monkeypatch, caplog, change, said):
    toys.train(toys.spec(**FLAT), tmp_path)
    before = meta_of(tmp_path, 8)["compiled"]
    if change == "jaxlib":
        monkeypatch.setattr(jaxlib, "__version__", "99.0")
    if change == "flags":
        monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some=1")
    changes = {"mesh": specs.MeshSpec(data=2)} if change == "mesh" else {}
    task = Doubled() if change == "task" else None
    assert go_on(tmp_path, task, **changes).step == 16
    assert caplog.messages == [otherwise(said)]
    assert executable.difference(before, meta_of(tmp_path, 16)["compiled"]) == said
    go_on(tmp_path, task, **changes, **{"train.steps": 18})
    assert len(caplog.messages) == 1  # from here on it is the one that the newest checkpoint has


def test_a_checkpoint_that_does_not_say_goes_on_silently(tmp_path, caplog):
    toys.train(toys.spec(**FLAT), tmp_path)
    path = tmp_path / "checkpoints/8/meta/metadata"
    meta = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("compiled", "checksum")}
    path.write_text(json.dumps(reading.sealed(meta)))
    assert go_on(tmp_path, Doubled()).step == 16
    assert caplog.messages == []


# ------------------------------------------------------------------------------------------- room


def hungry(x):
    """20 MB of temporaries that no fusion removes."""
    x = jnp.linspace(0, jnp.sum(x), 2300)
    return 0 * jnp.sum(jnp.sort(jnp.outer(x, x), axis=0)[3])


class HungryStep(toys.Masked):
    def grads(self, params, *args):
        grads, metrics, extras = super().grads(params, *args)
        return jax.tree.map(lambda g: g + hungry(params["head"]["kernel"]), grads), metrics, extras


class HungryEvaluation(toys.Masked):
    def evaluate(self, params, *args):
        return jax.tree.map(lambda m: m + hungry(params["head"]["kernel"]), super().evaluate(params, *args))


class HungrySamples(toys.Masked):
    def samples(self, params, *args):
        return jax.tree.map(
            lambda x: x + hungry(params["head"]["kernel"]).astype(x.dtype), super().samples(params, *args)
        )


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(executable, "limit", lambda _: BUDGET)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("task", "said"),
    [
        (HungryStep, "the train step"),
        (HungryEvaluation, "the evaluation"),
        (HungrySamples, "the drawing of samples"),
    ],
)
def test_a_program_that_has_no_room_ends_the_run_before_its_first_step(tmp_path, task, said):
    with pytest.raises(executable.DeviceMemoryError) as error:
        toys.train(toys.spec(), tmp_path, task())
    assert str(error.value).startswith(f"{said} takes at least ")
    for part in (" MiB arguments", " MiB temporaries", "a run may take 10.0 MiB", "train.batch_size", "model.remat"):
        assert part in str(error.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert not [line for line in logs.read_metrics(tmp_path) if "loss" in line]


@pytest.mark.usefixtures("_small")
def test_a_run_that_has_room_is_trained(tmp_path):
    assert toys.train(toys.spec(), tmp_path).step == 8


def test_what_lies_beside_a_programs_arguments_counts(tmp_path, monkeypatch):
    """A step that is made twice starts from a copy; the evaluation reads the EMA alone, and all the state stays."""
    monkeypatch.setattr(executable, "limit", lambda _: BUDGET)
    beside = {}
    check = executable.check_room

    def noted(what, parts, *args):
        beside[what] = parts.get("beside them")
        check(what, parts, *args)

    monkeypatch.setattr(executable, "check_room", noted)
    run = toys.spec(**{"optimizer.ema_decay": 0.9})
    toys.train(run, tmp_path / "once")
    count = 2 * toys.WIDTH * (toys.WIDTH + 1) + toys.WIDTH * toys.CODES  # trained; the "unused" have no moments
    assert beside["the train step"] == 0
    assert beside["the evaluation"] == 4 * (3 * count + toys.CODES) + 4 * 3  # parameters, two moments and counters
    twice = dataclasses.replace(run, train=dataclasses.replace(run.train, replay_every=2))
    toys.train(twice, tmp_path / "twice")
    assert beside["the train step"] == beside["the evaluation"] + 4 * (count + toys.CODES)


def test_a_state_that_has_no_room_is_not_even_made(tmp_path, monkeypatch):
    monkeypatch.setattr(executable, "limit", lambda _: 1000)
    with pytest.raises(executable.DeviceMemoryError, match=r"the state takes .* MiB parameters, .*more devices"):
        toys.train(toys.spec(), tmp_path)


def test_frozen_networks_that_have_no_room_are_not_even_placed(tmp_path, monkeypatch):
    class Large(toys.Masked):
        def frozen(self):
            return {"network": np.zeros((4 * 2**20,), np.float32)}

    def place(*_):
        raise AssertionError("placed")

    monkeypatch.setattr(executable, "limit", lambda _: BUDGET)
    monkeypatch.setattr(sharding, "place", place)
    with pytest.raises(executable.DeviceMemoryError, match=r"the state takes .* 16\.0 MiB frozen networks"):
        toys.train(toys.spec(), tmp_path, Large())


def test_a_compiler_that_finds_no_room_is_understood(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")

    monkeypatch.setattr("muse_jax.training.step.Program.compile_train", full)
    with pytest.raises(executable.DeviceMemoryError, match="the train step can't be compiled .*Ran out of memory"):
        toys.train(toys.spec(), tmp_path)


def test_the_smallest_device_is_the_limit_and_a_cpu_names_none():
    devices = [
        types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
        for stats in ({"bytes_limit": 7, "bytes_in_use": 1}, {"bytes_limit": 5})
    ]
    assert executable.limit(devices) == 5
    assert executable.limit(jax.local_devices()) == 0
