"""T5X checkpoints, written in their layout; where t5x is installed, its own network and its embeddings."""

import json

import gcs
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util
from peers import imported
from safetensors.numpy import load_file
from small import IDS, MASK, SIZES, our_embeddings, our_params, relative_error, spec_of, write_t5x

from muse_jax.import_weights import import_weights
from muse_jax.interop import folder
from muse_jax.interop.tensors import WeightsError

QUERY = "target.encoder.layers_1.attention.query.kernel"


@pytest.mark.parametrize("gated", [True, False], ids=["t5 1.1", "t5 v1.0"])
def test_parameters_are_those_written(tmp_path, gated):
    spec = spec_of(gated=gated)
    params = our_params(spec)
    write_t5x(tmp_path / "t5x", params, held=["encoder/encoder_norm/scale"])
    manifest = import_weights("t5x", str(tmp_path / "t5x"), str(tmp_path / "out"))
    read = load_file(tmp_path / "out" / folder.PARAMS)
    assert read.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)
    assert manifest["model"]["gated"] is gated
    assert folder.text_encoder_spec(tmp_path / "out").width == spec.width


def test_a_checkpoint_in_a_bucket(tmp_path):
    params = our_params()
    write_t5x(tmp_path / "cloud/t5x/checkpoint_1", params)
    with gcs.standing_in(tmp_path / "cloud"):
        for _ in range(2):  # the second replaces the first
            import_weights("t5x", f"{gcs.BUCKET}/t5x/checkpoint_1", f"{gcs.BUCKET}/weights")
        assert folder.text_encoder_spec(f"{gcs.BUCKET}/weights").width == spec_of().width
    assert sorted(p.name for p in (tmp_path / "cloud").iterdir()) == ["t5x", "weights"]
    read = load_file(tmp_path / "cloud/weights" / folder.PARAMS)
    assert read.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_bfloat16_stays_bfloat16(tmp_path):
    params = our_params()
    write_t5x(tmp_path / "t5x", params, "bfloat16")
    import_weights("t5x", str(tmp_path / "t5x"), str(tmp_path / "out"))
    name = "encoder/layers/mlp/wo/kernel"
    read = load_file(tmp_path / "out" / folder.PARAMS)[name]
    np.testing.assert_array_equal(read, params[name].astype(ml_dtypes.bfloat16))


def _lose_chunk(path):
    (path / QUERY / "0.1").unlink()


def _unlink_chunk(path):
    """Listed, and not there."""
    (path / QUERY / "0.1").unlink()
    (path / QUERY / "0.1").symlink_to(path / "nowhere")


def _lie_about_the_shape(path):
    about = path / QUERY / ".zarray"
    about.write_text(json.dumps({**json.loads(about.read_text()), "shape": [2**40, 2**40], "chunks": [1, 1]}))


def _rename_chunk(path):
    (path / QUERY / "1.1").rename(path / QUERY / "9.9")


def _edit_description(value):
    def change(path):
        (path / QUERY / ".zarray").write_text(value)

    return change


def _change_version(path):
    tree = serialization.msgpack_restore((path / "checkpoint").read_bytes())
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize({**tree, "version": "3"}))


def _cut_chunk(path):
    chunk = path / QUERY / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:40])


def _lose_array(path):
    (path / QUERY).rename(path / "elsewhere")


def _rename(path):
    _edit(path, lambda layer: layer["attention"].update(q=layer["attention"].pop("query")))
    (path / QUERY).rename(path / QUERY.replace("query", "q"))


def _edit(path, change):
    tree = serialization.msgpack_restore((path / "checkpoint").read_bytes())
    layer = tree["optimizer"]["target"]["encoder"]["layers_1"]
    change(layer)
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def _hold(value):
    return lambda path: _edit(path, lambda layer: layer["attention"]["query"].update(kernel=value))


def _cut_tree(path):
    (path / "checkpoint").write_bytes((path / "checkpoint").read_bytes()[:-20])


def _filter(path):
    about = path / QUERY / ".zarray"
    about.write_text(about.read_text().replace('"gzip"', '"pickle"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_chunk, f"{QUERY} lacks the chunk 0.1: found 3 chunks; expected 4 for \\(24, 30\\)"),
        (_unlink_chunk, f"{QUERY} can't be read, it is damaged: .*chunk {{0, 1}}"),
        (_lie_about_the_shape, f"{QUERY} lacks the chunk 0.2: found 4 chunks; expected .* for \\(1099511627776, "),
        (_rename_chunk, f"{QUERY} lacks the chunk 1.1: found 4 chunks; expected 4"),
        (_edit_description("[" * 100_000), f"{QUERY} has no .zarray that can be read"),
        (_change_version, "has version '3' of T5X's layout"),
        (_cut_chunk, f"{QUERY} can't be read, it is damaged"),
        (_lose_array, f"lacks the tensor {QUERY}; expected a folder"),
        (_rename, f"lacks the tensor {QUERY}; .* it has target.encoder.layers_1.attention.q.kernel"),
        (_hold(np.zeros((30, 24), "f4")), f"{QUERY} has the shape \\(30, 24\\); expected \\(24, 30\\)"),
        (_hold(7), f"{QUERY} is a int; expected an array"),
        (_filter, f"{QUERY} has the dtype '<f4', compressor 'pickle'"),
        (_cut_tree, "checkpoint is damaged or not of a T5X checkpoint"),
        (lambda path: (path / "checkpoint").unlink(), "has no file named checkpoint"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path, damage, message):
    write_t5x(tmp_path / "t5x", our_params())
    damage(tmp_path / "t5x")
    with pytest.raises(WeightsError, match=message):
        import_weights("t5x", str(tmp_path / "t5x"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["t5x"]


def test_a_transposed_position_bias_is_no_other_model(tmp_path):
    """With 4 heads of 8 it could be taken for one of 32 heads and 4 buckets."""
    params = our_params(spec_of({**SIZES, "num_heads": 4, "d_kv": 8}))
    bias = "encoder/relpos_bias/rel_embedding"
    write_t5x(tmp_path / "t5x", {**params, bias: np.ascontiguousarray(params[bias].T)})
    with pytest.raises(WeightsError, match=r"rel_embedding has the shape \(32, 4\); expected \(heads, 32\)"):
        import_weights("t5x", str(tmp_path / "t5x"), str(tmp_path / "out"))


@pytest.mark.parametrize("gated", [True, False])
def test_embeddings_equal_t5x(tmp_path, gated):
    """T5X's own network with random parameters, whose names are compared too."""
    network = imported("t5x.examples.t5.network", "see third_party/README.md")
    config = network.T5Config(
        vocab_size=SIZES["vocab_size"],
        dtype=jnp.float32,
        emb_dim=SIZES["d_model"],
        num_heads=SIZES["num_heads"],
        num_encoder_layers=SIZES["num_layers"],
        num_decoder_layers=1,
        head_dim=SIZES["d_kv"],
        mlp_dim=SIZES["d_ff"],
        mlp_activations=("gelu", "linear") if gated else ("relu",),
    )
    model = network.Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, IDS, IDS, enable_dropout=False)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    want = model.apply({"params": params}, IDS, enable_dropout=False, method=model.encode)
    write_t5x(tmp_path / "t5x", traverse_util.flatten_dict(params, sep="/"))
    import_weights("t5x", str(tmp_path / "t5x"), str(tmp_path / "out"))
    error = relative_error(our_embeddings(tmp_path / "out"), want, MASK)
    print(f"t5x relative error {error:.2e}")
    assert error < 1e-5
