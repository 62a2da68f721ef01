"""Wrong configs fail before anything compiles, and say how to mend them."""

import copy
import json

import pytest
from ml_collections import ConfigDict

from muse_jax import specs

TEXT = {
    "vocabulary_size": 50,
    "layers": 1,
    "width": 16,
    "heads": 2,
    "head_dim": 8,
    "mlp_width": 32,
}
REST = {
    "seed": 3,
    "data": {"name": "scenes", "image_size": 32, "text_length": 12, "vocabulary": "scenes"},
    "optimizer": {"learning_rate": 1e-3, "overrides": {"discriminator": {"learning_rate": 1e-4}}},
    "mesh": {},
    "rules": {"batch": ["data", "fsdp"], "mlp": "tensor", "embed": None},
    "train": {"steps": 10, "batch_size": 8},
    "checkpoint": {},
    "sample": {},
}
TOKENIZER = {
    **REST,
    "task": {"name": "tokenizer"},
    "model": {
        "name": "vqgan",
        "codebook_size": 64,
        "code_dim": 8,
        "channels": 32,
        "channel_multipliers": [1, 2, 2],
        "res_blocks": 1,
    },
}
BASE = {
    **REST,
    "task": {"name": "tokens", "tokenizer": "somewhere"},
    "model": {
        "name": "base",
        "codebook_size": 64,
        "grid": [8, 8],
        "layers": 2,
        "width": 32,
        "heads": 2,
        "mlp_width": 64,
        "text": TEXT,
    },
}
SUPERRES = {
    **REST,
    "task": {"name": "tokens", "tokenizer": "high", "low_tokenizer": "low"},
    "model": {
        "name": "superres",
        "codebook_size": 64,
        "grid": [16, 16],
        "low_codebook_size": 64,
        "low_grid": [8, 8],
        "low_layers": 1,
        "layers": 2,
        "width": 32,
        "heads": 2,
        "mlp_width": 64,
        "block": [4, 4],
        "text": TEXT,
    },
}
PICTURES = {**BASE, "data": {**BASE["data"], "name": "folder", "path": "somewhere", "vocabulary": ""}}
PAELLA = {
    **BASE,
    "task": {**BASE["task"], "corruption": "noise"},
    "model": {
        "name": "paella",
        "codebook_size": 64,
        "grid": [8, 8],
        "widths": [32, 32],
        "down_blocks": [1, 2],
        "up_blocks": [2, 1],
        "heads": 2,
        "text": TEXT,
    },
}


def _changed(config, path, value):
    config = copy.deepcopy(config)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    return config


@pytest.mark.parametrize("config", [TOKENIZER, BASE, SUPERRES, PAELLA], ids=["tokenizer", "base", "superres", "paella"])
def test_round_trip_through_json(config):
    spec = specs.from_config(ConfigDict(config))
    assert specs.from_config(json.loads(json.dumps(specs.to_config(spec)))) == spec
    assert specs.from_config(config) == spec, "a plain dict and a ConfigDict are read alike"
    assert hash(spec.model), "specs of models are static arguments of jitted functions"


def test_values_arrive():
    spec = specs.from_config(ConfigDict(BASE))
    assert spec.model.grid == (8, 8)
    assert spec.rules == {"batch": ("data", "fsdp"), "mlp": "tensor", "embed": None}
    assert spec.optimizer.overrides == {"discriminator": {"learning_rate": 1e-4}}
    assert spec.seed == 3
    assert specs.from_config(ConfigDict(TOKENIZER)).model.factor == 4


ADVERSARIAL = _changed(TOKENIZER, "task.adversarial", 0.1)
FOLDER = _changed(BASE, "data.name", "folder")


@pytest.mark.parametrize(
    ("config", "path", "value", "words"),
    [
        (BASE, "train.stepz", 5, ["train.stepz", "'steps'"]),
        (BASE, "task.corruption", "noise", ["task.corruption", "'mask'"]),
        (BASE, "task.picture_share", 0.1, ["task.picture_share", "Paella"]),
        (PAELLA, "task.corruption", "mask", ["task.corruption", "'noise'"]),
        (PAELLA, "task.picture_share", 0.1, ["task.picture_share", "model.picture_encoder"]),
        (PAELLA, "model.widths", [32, 32, 32], ["model.widths", "one number for each level"]),
        (PAELLA, "model.up_blocks", [2, 0], ["model.up_blocks", "at least 1"]),
        (PAELLA, "model.grid", [2, 8], ["model.grid", "4 of each"]),
        (PAELLA, "model.heads", 3, ["model.widths", "model.heads 3"]),
        (BASE, "optimiser", {}, ["config.optimiser", "'optimizer'"]),
        (BASE, "model.text.with", 5, ["model.text.with", "'width'"]),
        (BASE, "train.steps", "many", ["train.steps", "'many'", "int"]),
        (BASE, "train.steps", True, ["train.steps", "bool", "int"]),
        (BASE, "train.steps", 1.5, ["train.steps", "float", "int"]),
        (BASE, "model.grid", [8], ["model.grid", "expected 2"]),
        (BASE, "model.grid", 8, ["model.grid", "sequence"]),
        (BASE, "model.grid", [8, "8"], ["model.grid[1]", "str"]),
        (BASE, "train", 7, ["train", "section"]),
        (BASE, "model.name", "bse", ["model.name", "'bse'", "'base'"]),
        (BASE, "task.name", "token", ["task.name", "'tokens'"]),
        (BASE, "train.batch_size", 0, ["train.batch_size", "at least 1"]),
        (BASE, "checkpoint.keep", 0, ["checkpoint.keep", "at least 1"]),
        (BASE, "optimizer.accumulate", 3, ["train.batch_size 8", "optimizer.accumulate 3"]),
        (BASE, "optimizer.name", "sgd", ["optimizer.name", "'adafactor'"]),
        (BASE, "optimizer.schedule", "cosin", ["optimizer.schedule", "'cosin'", "'cosine'"]),
        (BASE, "data.crop", "middle", ["data.crop", "'middle'", "'center'"]),
        (BASE, "data.name", "cats", ["data.name", "'folder'"]),
        (BASE, "rules.mlp", "model", ["rules.mlp", "'model'", "'tensor'"]),
        (BASE, "rules.mlp", 3, ["rules.mlp", "3", "'tensor'"]),
        (BASE, "data.path", "pictures", ["data.path is 'pictures'", "--configs=configs/pictures"]),
        (FOLDER, "data.path", "gs://b/pictures", ["data.path is 'gs://b/pictures'", "mount"]),
        (BASE, "model.dtype", "float64", ["model.dtype", "'bfloat16'"]),
        (BASE, "model.remat", "nothing", ["model.remat", "jax.checkpoint_policies"]),
        (BASE, "model.remat", "save_only_these_names", ["model.remat", "jax.checkpoint_policies", "makes one"]),
        (BASE, "model.remat", "save_from_both_policies", ["model.remat", "jax.checkpoint_policies", "makes one"]),
        (BASE, "model.text.position_buckets", 3, ["model.text.position_buckets is 3", "at least 4"]),
        (BASE, "model.text.position_max_distance", 8, ["model.text.position_max_distance is 8", "more than 8"]),
        (BASE, "optimizer.overrides", {"embeddings": 3}, ["optimizer.overrides.embeddings", "a section"]),
        (BASE, "optimizer.overrides", {"embeddings": {"name": "sgd"}}, ["optimizer.overrides.embeddings.name"]),
        (TOKENIZER, "model.normalization", "batch", ["model.normalization", "'layer'"]),
        (TOKENIZER, "model.channels", 33, ["model.channels", "multiple of 32"]),
        (TOKENIZER, "model.channel_multipliers", [], ["model.channel_multipliers", "at least 1"]),
        (SUPERRES, "model.block", [0, 0], ["model.block", "at least 1"]),
        (BASE, "model.attention", "flash", ["model.attention", "'cudnn'"]),
        (BASE, "model.attention", "cudnn", ["model.attention", "16 bits", "'float32'"]),
        (BASE, "optimizer.gradient_dtype", "float16", ["optimizer.gradient_dtype", "'bfloat16'"]),
        (BASE, "train.skip_batches", ((5, 3),), ["train.skip_batches", "(first, after)"]),
        (BASE, "train.skip_batches", ((1, 4), (3, 6)), ["train.skip_batches", "don't touch"]),
        (BASE, "train.matmul_precision", "float16", ["train.matmul_precision", "'bfloat16'"]),
        (BASE, "profile", {"num_steps": -1}, ["profile.num_steps", "at least 0"]),
        (BASE, "model.heads", 3, ["model.width 32", "model.heads 3"]),
        (BASE, "data.text_length", 0, ["data.text_length"]),
        (BASE, "task.tokenizer", "", ["task.tokenizer", "--config.task.tokenizer"]),
        (BASE, "model.text.trainable", False, ["model.text.weights"]),
        (BASE, "task", {"name": "tokenizer"}, ["task.name 'tokens'"]),
        (SUPERRES, "task.low_tokenizer", "", ["task.low_tokenizer"]),
        (SUPERRES, "model.heads", 1, ["model.heads 1"]),
        (SUPERRES, "model.block", [3, 4], ["model.block (3, 4)", "model.grid"]),
        (TOKENIZER, "data.image_size", 30, ["data.image_size 30", "factor 4"]),
        (TOKENIZER, "task", {"name": "tokens", "tokenizer": "x"}, ["task.name 'tokenizer'"]),
        (TOKENIZER, "task.trainable", "encoder", ["task.trainable", "'decoder'"]),
        (TOKENIZER, "task.trainable", "decoder", ["task.init_from"]),
        (ADVERSARIAL, "model.discriminator_layers", 6, ["model.discriminator_layers is 6", "32", "at most 5"]),
        (TOKENIZER, "task.perceptual", 0.1, ["task.perceptual_weights", "task.perceptual=0"]),
    ],
)
def test_a_wrong_config_names_the_mend(config, path, value, words):
    specs.from_config(ConfigDict(config))
    with pytest.raises(specs.SpecError) as error:
        specs.from_config(ConfigDict(_changed(config, path, value)))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "path", "value"),
    [
        (BASE, "model.remat", "dots_with_no_batch_dims_saveable"),
        (BASE, "model.text.position_buckets", 4),
        (BASE, "model.text.position_max_distance", 9),
        (TOKENIZER, "model.discriminator_layers", 6),  # it isn't used
        (ADVERSARIAL, "model.discriminator_layers", 5),
        (BASE, "deadlines", {"save": 0.0}),
    ],
)
def test_what_just_fits_is_taken(config, path, value):
    specs.from_config(ConfigDict(_changed(config, path, value)))


NAN = float("nan")


@pytest.mark.parametrize(
    ("config", "path", "values"),
    [
        (BASE, "task.text_dropout", [-0.1, 1.5, NAN]),
        (BASE, "task.label_smoothing", [-0.1, 1.0, NAN]),
        (BASE, "task.min_mask_ratio", [-0.1, 1.1, NAN]),
        (BASE, "task.visible_weight", [-1.0, NAN, float("inf")]),
        (SUPERRES, "task.low_corruption", [-0.1, 1.1, NAN]),
        (_changed(PAELLA, "model.picture_encoder", True), "task.picture_share", [-0.1, 1.1, NAN]),
        (BASE, "model.dropout", [-0.1, 1.0, NAN]),
        (PAELLA, "model.text.dropout", [1.0]),
        (TOKENIZER, "task.commitment", [-0.25, NAN]),
        (TOKENIZER, "task.adversarial_start", [-1]),
        (BASE, "optimizer.learning_rate", [-1e-3, NAN]),
        (BASE, "optimizer.b2", [1.0, NAN]),
        (BASE, "optimizer.overrides.embeddings.learning_rate", [-1.0, NAN]),
        (BASE, "seed", [-1, 2**63]),
        (BASE, "mesh.slices", [0, -1]),
        (BASE, "model.heads", [0]),
        (BASE, "model.text.layers", [0]),
        (PAELLA, "model.layer_scale", [NAN]),
        (TOKENIZER, "model.stem_patch", [0, -1]),
        (TOKENIZER, "model.decoder_channels", [-1]),
        (BASE, "optimizer.ema_decay", [1.0, -0.9]),
        (BASE, "optimizer.accumulate", [0]),
        (BASE, "train.eval_batches", [-1]),
        (BASE, "deadlines.heartbeat", [0.0, NAN, float("inf")]),
        (BASE, "deadlines.save", [-1.0, NAN, float("inf")]),
        (PICTURES, "data.min_side", [-3]),
        (PICTURES, "data.max_aspect", [NAN, 0.5, -2.0]),
        (PICTURES, "data.workers", [-1]),
    ],
)
def test_numbers_that_would_train_nonsense_are_named(config, path, values):
    config = {"deadlines": {}, "mesh": {}, **config}
    if "overrides" in path:
        config = _changed(config, "optimizer.overrides", {"embeddings": {}})
    specs.from_config(ConfigDict(config))
    for value in values:
        with pytest.raises(specs.SpecError, match=f"{path} is {value}[;,]"):
            specs.from_config(ConfigDict(_changed(config, path, value)))


def test_a_profile_that_would_never_be_taken_is_refused():
    late = {**BASE, "profile": {"start_step": 10}}
    specs.from_config(late)
    with pytest.raises(specs.SpecError, match=r"profile\.start_step is 10, .* train\.steps 10"):
        specs.from_config(_changed(late, "profile.num_steps", 2))
    specs.from_config({**BASE, "profile": {"start_step": 9, "num_steps": 2}})  # as far as the run goes


@pytest.mark.parametrize("options", [{"v4": {"xla_some": True}}, {"TPU v4": True}, {"xla_some": {"of": True}}])
def test_a_compilers_options_that_none_would_get_are_refused(options):
    specs.from_config(_changed(BASE, "train.tpu_options", {"xla_some": True, "TPU v4": {"xla_other": 3}}))
    with pytest.raises(specs.SpecError, match=r"train\.tpu_options has .*'TPU v4'"):
        specs.from_config(_changed(BASE, "train.tpu_options", options))


def test_missing_keys_are_named():
    config = copy.deepcopy(BASE)
    del config["model"]["width"], config["model"]["heads"]
    with pytest.raises(specs.SpecError, match="model lacks width, heads"):
        specs.from_config(ConfigDict(config))
    config = copy.deepcopy(BASE)
    del config["model"]
    with pytest.raises(specs.SpecError, match=r"model\.name is None"):
        specs.from_config(ConfigDict(config))


def test_a_stored_config_is_completed_with_what_came_since():
    """A run started before a key existed goes on as it was: at the key's default."""
    stored = specs.to_config(specs.from_config(TOKENIZER))
    older = json.loads(json.dumps(stored))
    del older["model"]["encoder_kernel"], older["train"]["stop_after_nonfinite"]
    assert specs.completed(older) == stored
    refused_since = _changed(stored, "optimizer.ema_decay", 1.0)
    assert specs.completed(refused_since) == refused_since, "what is compared need not be what could be started"
    with pytest.raises(specs.SpecError, match="removed_since"):
        specs.completed({**older, "data": {**older["data"], "removed_since": 1}})
