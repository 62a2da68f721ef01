"""The folder that is written: whole or not at all, block by block; and read: by each device its part."""

import json
import os
import tracemalloc
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from small import IDS, MASK, our_params, spec_of

from muse_jax import specs, stages
from muse_jax.interop import folder, tensors
from muse_jax.interop.tensors import WeightsError
from muse_jax.models import t5
from muse_jax.tasks import tokens as tokens_task
from muse_jax.training import sharding, trees

EVEN = {"vocab_size": 64, "num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48}


def converted(params, model=None):
    def leaf(name, value):
        blocks = lambda: ((name, block) for block in (value if value.ndim == 3 else [value]))  # noqa: E731
        return folder.Leaf(name, value.shape, value.dtype, blocks, narrow=not name.endswith("scale"))

    return folder.Converted("text_encoder", [leaf(n, v) for n, v in params.items()], model or {})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A text encoder's folder, its spec and its parameters."""
    path = tmp_path_factory.mktemp("weights") / "t5"
    spec = spec_of(EVEN)
    params = our_params(spec)
    model = {k: getattr(spec, k) for k in spec.__dataclass_fields__ if k not in ("trainable", "weights")}
    folder.write(path, converted(params, model), {"from": "test"})
    return path, folder.text_encoder_spec(path), params


def test_safetensors_own_reader_reads_it(written):
    path, _, params = written
    read = load_file(path / folder.PARAMS)
    assert read.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "source"])
def test_dtypes(tmp_path, dtype):
    params = {"a": np.ones((2, 3), ml_dtypes.bfloat16), "b": np.ones(5, np.float16), "c/scale": np.ones(2, "f4")}
    manifest = folder.write(tmp_path / "out", converted(params), {}, dtype)
    kept = {"float32": ["float32"] * 3, "bfloat16": ["bfloat16"] * 2 + ["float32"]}
    kept["source"] = ["bfloat16", "float32", "float32"]
    read = load_file(tmp_path / "out" / folder.PARAMS)
    assert [read[name].dtype.name for name in params] == kept[dtype]
    assert {name: trees.fingerprint_numpy(leaf) for name, leaf in read.items()} == {
        name: entry["fingerprint"] for name, entry in manifest["tensors"].items()
    }


def test_a_model_is_never_whole_in_memory(tmp_path):
    """40 layers of 1 MB are written, and read in shards, with a few layers' memory."""
    layers, side, made = 40, 512, 0

    def blocks():
        nonlocal made
        for _ in range(layers):
            made += 1
            yield f"layer {made}", np.full((side, side), made, np.float32)

    leaf = folder.Leaf("encoder/kernel", (layers, side, side), np.dtype("f4"), blocks)
    tracemalloc.start()
    folder.write(tmp_path / "out", folder.Converted("text_encoder", [leaf], {}), {})
    part = folder.open_params(tmp_path / "out")["encoder/kernel"][:, :64]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made == layers
    np.testing.assert_array_equal(part[:, 0, 0], np.arange(1, layers + 1))
    print(f"peak {peak / 2**20:.1f} MiB of {layers} MiB")
    assert peak < 12 * 2**20


@pytest.fixture
def requests(monkeypatch):
    """(name, bytes) of everything that is read from files."""
    seen = []
    read = tensors.SafeTensor.__getitem__

    def counting(self, index):
        part = read(self, index)
        seen.append((self.name, part.nbytes))
        return part

    monkeypatch.setattr(tensors.SafeTensor, "__getitem__", counting)
    return seen


def opened(text):
    """The text encoder of a run with this spec, in boxes with its axes' names, as the task hands it to the trainer."""
    model = types.SimpleNamespace(text=text, dtype="float32")
    spec = specs.Spec(
        *(0, None, model, specs.DataSpec("scenes", 32, text_length=4), specs.OptimizerSpec(), specs.MeshSpec(), {}),
        *(specs.TrainSpec(1, 1), specs.CheckpointSpec(), specs.SampleSpec()),
    )
    params = stages._text_encoder(spec, False)
    shapes = jax.eval_shape(t5.from_spec(text).init, jax.random.key(0), IDS, MASK)["params"]
    return tokens_task._boxed(shapes, params)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_a_sharded_load_equals_the_whole_and_reads_each_slice_once(written, requests, sizes):
    path, spec, params = written
    boxes = opened(spec)
    assert not requests, "nothing is read before it is known where it goes"
    mesh = sharding.make_mesh(specs.MeshSpec(*sizes))
    where = sharding.param_specs(boxes, specs.RULES, mesh)
    tree = sharding.unbox(boxes)
    placed = sharding.place(tree, sharding.shardings(tree, where, mesh))
    for name, leaf in trees.named_leaves(placed).items():
        np.testing.assert_array_equal(leaf, params[name], err_msg=name)
        shards = {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
        assert sorted(n for who, n in requests if who == name) == sorted(shards.values()), name
        assert sum(shards.values()) == params[name].nbytes, name
    if sizes == (1, 2, 4):
        kernel = placed["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes // 8
        apply = jax.jit(t5.from_spec(spec).apply)
        with sharding.layout(mesh, specs.RULES):
            got = apply({"params": placed}, IDS, MASK)
        whole = apply({"params": trees.nest({n: jnp.asarray(v) for n, v in params.items()})}, IDS, MASK)
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-4)


def test_a_process_reads_only_what_its_devices_hold(written, requests):
    """As on one of several hosts: half of the devices are not this process's."""
    path, spec, params = written
    mesh = sharding.make_mesh(specs.MeshSpec(1, 8, 1))
    name = "encoder/layers/mlp/wi_0/kernel"
    stored = folder.open_params(path)[name]
    own = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    indices = own.devices_indices_map(stored.shape)
    parts = [stored[index] for device, index in indices.items() if device.id < 4]
    np.testing.assert_array_equal(np.concatenate(parts, 1), params[name][:, :16])
    assert sum(count for _, count in requests) == params[name].nbytes // 2


@pytest.mark.parametrize("index", [np.s_[1], np.s_[:, 3:9], np.s_[:, :, 40:], np.s_[1:, ::2, 5], np.s_[:0], ()])
def test_remote_files_give_the_same_slices(written, monkeypatch, index):
    """By ranges of bytes, as from a bucket; with pieces so small that every way of reading is taken."""
    path, _, params = written
    monkeypatch.setattr(tensors, "_RUN", 64)
    for name in ("encoder/layers/mlp/wi_0/kernel", "token_embedder/embedding", "encoder/encoder_norm/scale"):
        stored, value = folder.open_params(path)[name], params[name]
        part = index if isinstance(index, tuple) else (index,)
        part = part[: value.ndim]
        np.testing.assert_array_equal(stored._remote(part), value[part], err_msg=f"{name} {part}")


def test_a_changed_byte_is_found(written, tmp_path):
    path, spec, _ = written
    copy = tmp_path / "t5"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / folder.PARAMS).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x55")
    mesh = sharding.make_mesh(specs.MeshSpec(1, 8, 1))
    tree = trees.nest(folder.open_params(copy))
    replicated = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), tree)
    with pytest.raises(specs.SpecError, match="token_embedder/embedding isn't what was written"):
        sharding.place(tree, replicated)


def test_nothing_is_left_of_what_fails(tmp_path):
    params = {"a": np.ones((2, 3), "f4"), "b": np.array([1, np.inf], "f4")}
    with pytest.raises(WeightsError, match="^out: b has values that are not finite in float32"):
        folder.write(tmp_path / "out", converted(params), {})
    assert not list(tmp_path.iterdir())
    folder.write(tmp_path / "out", converted({"a": params["a"]}), {})
    with pytest.raises(WeightsError, match="^out: b has values"):
        folder.write(tmp_path / "out", converted(params), {})
    assert load_file(tmp_path / "out" / folder.PARAMS).keys() == {"a"}
    folder.write(tmp_path / "out", converted({"a": params["a"] * 2}), {})
    assert load_file(tmp_path / "out" / folder.PARAMS)["a"][0, 0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_move_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder.write(tmp_path / "out", converted({"a": np.ones(2, "f4")}), {})
    rename = type(epath.Path(tmp_path)).rename

    def failing(self, target):
        if self.name.endswith(".draft"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(tmp_path)), "rename", failing)
        with pytest.raises(OSError, match="Input/output error"):
            folder.write(tmp_path / "out", converted({"a": np.zeros(2, "f4")}), {})
    assert load_file(tmp_path / "out" / folder.PARAMS)["a"][0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_drafts_of_killed_imports_are_swept_and_those_at_work_are_not(tmp_path):
    old, new = (tmp_path / f".out.{name}.draft" for name in ("old", "new"))
    for draft in (old, new):
        draft.mkdir()
        (draft / folder.PARAMS).write_text("half")
    for path in (old / folder.PARAMS, old):
        os.utime(path, (0, 0))
    folder.write(tmp_path / "out", converted({"a": np.ones(2, "f4")}), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.new.draft", "out"]


def test_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WeightsError, match="holds something else than imported weights"):
        folder.write(tmp_path, converted({"a": np.ones(2, "f4")}), {})
    out = tmp_path / "out"
    folder.write(out, converted({"a": np.ones(2, "f4")}), {})
    (out / "thesis.tex").write_text("here too")
    with pytest.raises(WeightsError, match=r"holds something else than imported weights \(thesis.tex\)"):
        folder.write(out, converted({"a": np.ones(2, "f4")}), {})
    (out / "thesis.tex").rename(out / folder.VOCABULARY)  # brought by hand, as for weights that come without
    with pytest.raises(WeightsError, match="would be lost; move it away"):
        folder.write(out, converted({"a": np.ones(2, "f4")}), {})
    assert (out / folder.VOCABULARY).read_text() == "here too"


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_written_where_it_leads(tmp_path, there):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "t5")
    for value in range(1 + there):
        folder.write(tmp_path / "link", converted({"a": np.full(2, value, "f4")}), {})
    assert (tmp_path / "link").is_symlink()
    assert load_file(tmp_path / "disk" / "t5" / folder.PARAMS)["a"][0] == there
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["disk", "link", "t5", folder.PARAMS, folder.MANIFEST]
    )


def test_an_empty_folder_may_be_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.write(".", converted({"a": np.ones(2, "f4")}), {})
    assert load_file(tmp_path / folder.PARAMS).keys() == {"a"}


def test_a_file_that_is_not_the_manifests_is_refused(written, tmp_path):
    path, spec, params = written
    (tmp_path / folder.MANIFEST).write_text((path / folder.MANIFEST).read_text())
    save_file({**params, "encoder/encoder_norm/scale": np.ones(3, "f4")}, tmp_path / folder.PARAMS)
    with pytest.raises(WeightsError, match=r"encoder/encoder_norm/scale has the shape \(3,\); expected \(32,\)"):
        folder.open_params(tmp_path)
    (tmp_path / folder.MANIFEST).write_text(json.dumps({"format": 2, "kind": "", "model": {}, "tensors": {}}))
    with pytest.raises(WeightsError, match="has format 2; this version reads 1"):
        folder.open_params(tmp_path)


def test_a_text_encoder_of_another_size_is_refused(written):
    path, spec, _ = written
    other = specs.TextEncoderSpec(64, 2, 32, 4, 8, 40, trainable=False, weights=str(path))
    with pytest.raises(specs.SpecError, match="wi_0/kernel has shape .* make the model section"):
        opened(other)


def test_plain_stage_folders_are_still_read(tmp_path):
    """`params.safetensors` without a manifest, as `save_stage` writes it."""
    spec = spec_of(EVEN)
    params = our_params(spec)
    save_file(params, tmp_path / folder.PARAMS)
    frozen = specs.TextEncoderSpec(64, 2, 32, 4, 8, 48, trainable=False, weights=str(tmp_path))
    boxes = opened(frozen)
    assert isinstance(boxes["token_embedder"]["embedding"], nn.LogicallyPartitioned)
    assert trees.describe(sharding.unbox(boxes)) == trees.describe(trees.nest(params))
