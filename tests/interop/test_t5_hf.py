"""Hugging Face's T5: its own embeddings from weights that it saved, and files that are refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import IDS, MASK, SIZES, our_embeddings, our_params, relative_error

from muse_jax.import_weights import import_weights
from muse_jax.interop import folder, t5_hf
from muse_jax.interop.tensors import WeightsError

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory, hf_model):
    """A small T5 1.1 as transformers saves it; and the model."""
    path = tmp_path_factory.mktemp("hf") / "t5"
    model = hf_model()
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("gated", [True, False], ids=["t5 1.1 and flan", "t5 v1.0"])
@pytest.mark.parametrize("encoder_only", [True, False])
def test_embeddings_equal_transformers(tmp_path, hf_model, hf_embeddings, gated, encoder_only):
    model = hf_model(gated, encoder_only, tie_word_embeddings=not gated)
    model.save_pretrained(tmp_path / "hf")
    manifest = import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    error = relative_error(our_embeddings(tmp_path / "out"), hf_embeddings(model))
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE
    assert manifest["model"]["gated"] is gated
    assert {entry["dtype"] for entry in manifest["tensors"].values()} == {"float32"}


def test_other_buckets_are_read_from_the_config(tmp_path, hf_model, hf_embeddings):
    model = hf_model(relative_attention_num_buckets=16, relative_attention_max_distance=40)
    model.save_pretrained(tmp_path / "hf")
    import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert relative_error(our_embeddings(tmp_path / "out"), hf_embeddings(model)) < TOLERANCE


def test_files_in_parts_and_torch_files_are_the_same_weights(tmp_path, saved, torch):
    path, model = saved
    import_weights("t5_hf", str(path), str(tmp_path / "whole"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    shutil.copy(path / "config.json", tmp_path / "bin")
    want = load_file(tmp_path / "whole" / folder.PARAMS)
    for other in ("parts", "bin"):
        import_weights("t5_hf", str(tmp_path / other), str(tmp_path / "out"))
        got = load_file(tmp_path / "out" / folder.PARAMS)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{other} {name}")


def test_sizes_come_from_the_tensors_where_there_is_no_config(tmp_path, saved):
    path, _ = saved
    with_config = import_weights("t5_hf", str(path), str(tmp_path / "one"))
    shutil.copy(path / "model.safetensors", tmp_path / "alone.safetensors")
    without = import_weights("t5_hf", str(tmp_path / "alone.safetensors"), str(tmp_path / "two"))
    assert without["model"] == with_config["model"]
    assert without["tensors"] == with_config["tensors"]


def change(name, to):
    def apply(tensors):
        value = tensors.pop(name)
        if to is not None:
            tensors.update(to(name, value))

    return apply


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"  # [30, 24]
REFUSED = {
    "missing": (change(Q, None), f"lacks the tensor {Q}; expected it with shape \\(30, 24\\)"),
    "renamed": (
        change(Q, lambda n, v: {n.replace(".q.", ".query."): v}),
        f"lacks the tensor {Q}; .* it has encoder.block.1.layer.0.SelfAttention.query.weight \\(30, 24\\)",
    ),
    "transposed": (
        change(Q, lambda n, v: {n: np.ascontiguousarray(v.T)}),
        f"{Q} has the shape \\(24, 30\\); expected \\(30, 24\\)",
    ),
    "integers": (change(Q, lambda n, v: {n: v.astype(np.int8)}), f"{Q} has the dtype int8; expected float"),
    "not finite": (
        change(Q, lambda n, v: {n: np.where(v == v.max(), np.nan, v)}),
        f"hf: {Q} has values that are not finite in float32",
    ),
    "umt5's bias in every layer": (
        change(Q, lambda n, v: {n: v, n.replace("q.", "relative_attention_bias."): v}),
        "has the tensor encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "another depth": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("encoder.block.2")],
        "lacks the tensor encoder.block.2.layer.0.SelfAttention.k.weight and 8 others",
    ),
    "a clip": (
        lambda tensors: (tensors.clear(), tensors.update({"text_model.embeddings.weight": np.ones((3, 2), "f4")})),
        "lacks the tensor encoder.block.0.* it has text_model.embeddings.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_tensors_are_refused_by_name(tmp_path, saved, case):
    alter, message = REFUSED[case]
    shutil.copytree(saved[0], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    alter(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def written():
    """The tensors of a small T5 1.1 as a Hugging Face file has them, without the peers."""
    tensors = {}
    for name, value in our_params().items():
        inner = name.removeprefix("encoder/layers/")
        for layer, part in enumerate(value) if inner != name else [(None, value)]:
            turned = part.T if t5_hf.NAMES.transposed(inner) else part
            tensors[t5_hf.NAMES.name(inner, layer)] = np.ascontiguousarray(turned)
    return tensors


BLOCK = "encoder.block.0.layer."
WITHOUT_CONFIG = {
    "transposed": (
        "0.SelfAttention.relative_attention_bias",
        (3, 32),
        r"has the shape \(3, 32\); expected \(32, heads\)",
    ),
    "no outputs": ("0.SelfAttention.q", (0, 24), r"has the shape \(0, 24\); expected sizes from 1"),
    "no inner": ("1.DenseReluDense.wi_0", (0, 24), r"has the shape \(0, 24\); expected sizes from 1"),
}


@pytest.mark.parametrize("case", WITHOUT_CONFIG)
def test_sizes_that_no_t5_has_are_refused_where_there_is_no_config(tmp_path, case):
    part, shape, message = WITHOUT_CONFIG[case]
    name = f"{BLOCK}{part}.weight"
    save_file({**written(), name: np.ones(shape, np.float32)}, tmp_path / "alone.safetensors")
    with pytest.raises(WeightsError, match=f"{name} {message}"):
        import_weights("t5_hf", str(tmp_path / "alone.safetensors"), str(tmp_path / "out"))


@pytest.mark.parametrize("number", ["1000", "9" * 5000])
def test_a_layer_that_no_t5_has_is_refused_by_its_name(tmp_path, number):
    tensors = written()
    tensors[Q.replace(".1.", f".{number}.", 1)] = tensors.pop(Q)
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(WeightsError, match=r"has the tensor encoder.block.\d+.*; expected layers .* below 1000"):
        import_weights("t5_hf", str(tmp_path / "alone.safetensors"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "umt5", "model_type 'umt5'; expected 't5'"),
        ("feed_forward_proj", "gated-silu", "feed_forward_proj 'gated-silu'"),
        ("layer_norm_epsilon", 1e-5, "layer_norm_epsilon 1e-05; expected 1e-6"),
        ("num_heads", 6, "encoder.block.0.layer.0.SelfAttention.* has the shape .*; expected"),
        ("num_heads", 0, "config.json has num_heads 0; expected a whole number from 1"),
        ("d_model", "24", "config.json has d_model '24'; expected a whole number"),
        ("vocab_size", 61.0, "config.json has vocab_size 61.0; expected a whole number"),
        ("num_layers", None, "config.json has num_layers None; expected a whole number"),
        ("num_layers", 10_000_000, "config.json has num_layers 10000000; expected at most"),
        ("vocab_size", 2**70, f"config.json has vocab_size {2**70}; expected a whole number from 1, below"),
        ("relative_attention_num_buckets", 1, "relative_attention_num_buckets 1; expected a whole number from 4"),
        ("relative_attention_max_distance", 8, "relative_attention_max_distance 8; expected more than a quarter"),
        ("feed_forward_proj", ["gated-gelu"], r"feed_forward_proj \['gated-gelu'\]"),
    ],
)
def test_other_models_are_refused_by_their_config(tmp_path, key, value, message):
    (tmp_path / "hf").mkdir()
    save_file(written(), tmp_path / "hf" / "model.safetensors")
    config = {**SIZES, "model_type": "t5", "feed_forward_proj": "gated-gelu", key: value}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", '{"model_type": "t5", ', "[1]", "{}", "[" * 100_000, "\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "hf").mkdir()
    save_file(written(), tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(WeightsError, match="config.json (is damaged|holds a list|has the model_type None)"):
        import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_missing_or_elsewhere_is_named(tmp_path, saved):
    saved[1].save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    part = listed["weight_map"]["shared.weight"]
    (tmp_path / "hf" / part).rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(WeightsError, match=f"lacks {part}, which has the tensor"):
        import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    listed["weight_map"]["shared.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(WeightsError, match="names the file '../elsewhere.safetensors'"):
        import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [1, None])
def test_an_index_that_names_no_file_is_refused_by_its_tensor(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"shared.weight": file}}))
    with pytest.raises(WeightsError, match=f"index.json has shared.weight in the file {file}; expected a file's name"):
        import_weights("t5_hf", str(tmp_path), str(tmp_path / "out"))


def test_an_index_of_endless_brackets_is_damaged(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":' + "[" * 100_000)
    with pytest.raises(WeightsError, match="index.json is damaged"):
        import_weights("t5_hf", str(tmp_path), str(tmp_path / "out"))


DEEP = {**SIZES, "num_layers": 24, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128}
# bfloat16 has 8 bits: at depth 24 embeddings were seen to differ by 1.2% of their length.
BFLOAT16 = 0.02


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16_at_depth_24_stays_near_float32(tmp_path, hf_model, hf_embeddings, stored):
    """On long prompts and on the empty one, guidance's other half: its end token alone, with and without padding."""
    model = hf_model(**{**DEEP, "encoder_only": True})
    model.save_pretrained(tmp_path / "hf")
    import_weights("t5_hf", str(tmp_path / "hf"), str(tmp_path / "out"), stored)
    got, want = our_embeddings(tmp_path / "out", dtype="bfloat16"), hf_embeddings(model)
    for name, rows in {"all": slice(None), "empty": slice(1, 2)}.items():
        error = relative_error(got[rows], want[rows], MASK[rows])
        print(f"{stored} {name}: relative error {error:.4f}")
        assert error < BFLOAT16
    alone = our_embeddings(tmp_path / "out", IDS[1:2, :1], MASK[1:2, :1], dtype="bfloat16")
    assert relative_error(alone, want[1:2, :1], MASK[1:2, :1]) < BFLOAT16
