"""Bits that differ between devices are found, wherever they lie; so are leaves that nobody split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding, PartitionSpec

from muse_jax import specs
from muse_jax.training import replicas, sharding, trainer, trees
from muse_jax.training import step as steps

MESH = sharding.make_mesh(specs.MeshSpec(2, 2, 2))
SPLIT = {  # leaf: how it is split
    "whole": PartitionSpec(),
    "rows": PartitionSpec("fsdp"),
    "columns": PartitionSpec(None, "tensor"),
    "both": PartitionSpec(("fsdp", "tensor")),
    "all": PartitionSpec("data", ("tensor", "fsdp")),
    "half": PartitionSpec("tensor", "data"),
    "mask": PartitionSpec("data"),
    "count": PartitionSpec(),
}


def leaves():
    rng = np.random.default_rng(0)
    made = {name: rng.normal(size=(8, 12)).astype(np.float32) for name in SPLIT}
    made["half"] = made["half"].astype(jnp.bfloat16)
    made["mask"] = made["mask"] > 0
    made["count"] = np.int32(7)
    return made


def placed():
    return {name: jax.device_put(leaf, NamedSharding(MESH, SPLIT[name])) for name, leaf in leaves().items()}


def flipped(array, device, at, bit):
    """The array with one bit of one device's part changed."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint8)[at] ^= np.uint8(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_fingerprints_are_those_of_the_whole_arrays_however_they_are_split():
    assert replicas.fingerprints(placed()) == {
        name: trees.fingerprint_numpy(np.asarray(leaf)) for name, leaf in leaves().items()
    }


@pytest.mark.parametrize("name", [name for name in SPLIT if name != "all"])
def test_one_flipped_bit_on_one_device_is_found(name):
    arrays, rng = placed(), np.random.default_rng(1)
    for device in MESH.devices.flat[:: 3 if name == "whole" else 7]:
        size = arrays[name].addressable_shards[0].data.nbytes
        bad = flipped(arrays[name], device, int(rng.integers(size)), int(rng.integers(1 if name == "mask" else 8)))
        with pytest.raises(replicas.ReplicaError, match=f"these: {name} on .*device {device.id} ") as raised:
            replicas.fingerprints({**arrays, name: bad})
        if name == "whole":  # seven of eight agree
            assert str(raised.value).count("(process 0)") == 1


def test_a_run_stops_and_saves_nothing_once_a_bit_has_flipped(tmp_path, monkeypatch):
    run = toys.spec(**{"train.batch_size": 8, "mesh": specs.MeshSpec(2, 2, 2), "train.compare_every": 5})
    original = trainer.Run._compare

    def after_a_flip(self):
        params = dict(self.state.params)
        params["head"] = {"kernel": flipped(params["head"]["kernel"], MESH.devices.flat[3], 5, 3)}
        self.state = self.state._replace(params=params)
        original(self)

    monkeypatch.setattr(trainer.Run, "_compare", after_a_flip)
    with pytest.raises(replicas.ReplicaError, match="head/kernel on .*device 3"):
        toys.train(run, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("mesh", [specs.MeshSpec(1, 1, 1), specs.MeshSpec(1, 8, 1)])
def test_a_step_that_is_made_twice_shows_what_was_computed_wrongly(tmp_path, monkeypatch, mesh):
    """Also where no device has a copy of what another has."""
    run = toys.spec(**{"train.batch_size": 8, "mesh": mesh, "train.replay_every": 2})
    compiled, calls = steps.Program.compile_train, []

    def wrong_once(program, lowered):
        step = compiled(program, lowered)

        def made(state, frozen, batch):
            calls.append(None)
            state, metrics = step(state, frozen, batch)
            if len(calls) != 5:  # steps 1, 2, 2 again, 3, and the one that goes wrong
                return state, metrics
            params = dict(state.params)
            params["head"] = {"kernel": flipped(params["head"]["kernel"], mesh_devices[-1], 0, 2)}
            return state._replace(params=params), metrics

        mesh_devices = program.mesh.devices.flat
        return made

    whole = toys.train(
        dataclasses.replace(run, train=dataclasses.replace(run.train, replay_every=0)), tmp_path / "whole"
    )
    assert toys.train(run, tmp_path / "replayed").metrics["loss"] == whole.metrics["loss"], "which changes nothing"
    monkeypatch.setattr(steps.Program, "compile_train", wrong_once)
    with pytest.raises(replicas.ReplicaError, match="step 4, made twice .* different bits in head/kernel"):
        toys.train(run, tmp_path / "wrong")
    assert [p.name for p in (tmp_path / "wrong" / "checkpoints").iterdir()] == ["3"]


def test_rules_that_split_too_little_stop_the_run_and_the_leaves_are_named(tmp_path):
    rules = {**toys.RULES, "embed": None, "mlp": None}
    mesh = specs.MeshSpec(1, 8, 1, most_bytes=1.1)
    run = toys.spec(**{"train.batch_size": 8, "mesh": mesh, "rules": rules})
    with pytest.raises(specs.SpecError, match=r"params take .* times an even .*layers/kernel \[2, 8, 8\]: 512 inst"):
        toys.train(run, tmp_path)


def test_an_optimizer_that_is_not_split_like_its_parameters_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sharding, "optimizer_specs", lambda state, *_: dict.fromkeys(trees.named_leaves(state), PartitionSpec())
    )
    run = toys.spec(**{"train.batch_size": 8, "mesh": specs.MeshSpec(1, 4, 2)})
    with pytest.raises(specs.SpecError, match=r"optimizer take .* config.rules ask for.*mu/layers/kernel"):
        toys.train(run, tmp_path)


def test_parameters_that_lie_elsewhere_than_asked_stop_the_run(tmp_path, monkeypatch):
    original = steps.Program.initial

    def initial(self):
        return jax.device_put(original(self), NamedSharding(self.mesh, PartitionSpec()))

    monkeypatch.setattr(steps.Program, "initial", initial)
    run = toys.spec(**{"train.batch_size": 8, "mesh": specs.MeshSpec(1, 4, 2)})
    with pytest.raises(specs.SpecError, match=r"params take .*layers/kernel \[2, 8, 8\]: 512 instead of 64"):
        toys.train(run, tmp_path)
