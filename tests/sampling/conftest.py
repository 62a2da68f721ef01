"""A pipeline of tiny models with random parameters: 2x2 low tokens, 4x4 high tokens, 16 pixels."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from muse_jax import specs
from muse_jax.models import muse, vqgan
from muse_jax.sampling.pipeline import MusePipeline
from muse_jax.text import vocabulary
from muse_jax.training import checkpoint

WORDS = vocabulary.WordVocabulary(["a", "blue", "circle", "red", "square"])
TEXT = {"vocabulary_size": WORDS.size, "layers": 1, "width": 8, "heads": 2, "head_dim": 4, "mlp_width": 8}
TRANSFORMER = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 16, "text": TEXT}
MODELS = {
    "tokenizer_low": {"name": "vqgan", "codebook_size": 11, "code_dim": 4, "channels": 4, "stem_patch": 4},
    "tokenizer_high": {"name": "vqgan", "codebook_size": 13, "code_dim": 4, "channels": 4, "stem_patch": 4},
    "base": {"name": "base", "codebook_size": 11, "grid": (2, 2), **TRANSFORMER},
    "superres": {
        "name": "superres",
        "codebook_size": 13,
        "grid": (4, 4),
        "low_codebook_size": 11,
        "low_grid": (2, 2),
        "low_layers": 1,
        "block": (2, 2),
        **TRANSFORMER,
    },
    "decoder": {
        "name": "vqgan",
        "codebook_size": 13,
        "code_dim": 4,
        "channels": 4,
        "stem_patch": 4,
        "decoder_channels": 8,
    },
}
SAMPLE = {
    "base": {"num_inference_steps": 3, "guidance_scale": 3.0},
    "superres": {"num_inference_steps": 3, "guidance_scale": 2.0},
}


def make_spec(name: str, **changes) -> specs.Spec:
    """The stage's spec, with changes to its model section."""
    model = {**MODELS[name], **changes}
    if model["name"] == "vqgan":
        model = {"channel_multipliers": (1,), "res_blocks": 1, "normalization": "layer", **model}
        task, text = {"name": "tokenizer"}, {}
    else:
        task, text = {"name": "tokens", "tokenizer": "x", "low_tokenizer": "y"}, {"text_length": 6}
    return specs.from_config(
        {
            "seed": 0,
            "task": task,
            "model": model,
            "data": {"name": "scenes", "image_size": 16, "vocabulary": "scenes", **text},
            "train": {"steps": 1, "batch_size": 1},
            "sample": SAMPLE.get(name, {}),
        }
    )


def make_stage(name: str, seed: int = 0, **changes) -> checkpoint.Stage:
    """A stage with random parameters."""
    made = make_spec(name, **changes)
    if isinstance(made.model, specs.VQGANSpec):
        model, args, words = vqgan.VQGAN(made.model), [jnp.zeros((1, 16, 16, 3))], None
    else:
        model, words = muse.TokenTransformer(made.model), WORDS.to_json()
        text = jnp.ones((1, 6), jnp.int32)
        args = [jnp.zeros((1, made.model.grid[0] * made.model.grid[1]), jnp.int32), text, text > 0]
        args += [jnp.zeros((1, 4), jnp.int32)] if isinstance(made.model, specs.SuperResSpec) else []
    shapes = jax.eval_shape(lambda: meta.unbox(model.init(jax.random.key(0), *args)["params"]))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.5).astype(np.float32), shapes)
    return checkpoint.Stage(made, params, words, f"somewhere/{name}", 7)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """`spec(name, **changes)` and `stage(name, seed, **changes)` of tiny stages, and a full set of `stages`."""
    stages = {name: make_stage(name, seed) for seed, name in enumerate(MODELS)}
    stages["decoder"].params["quantizer"] = stages["tokenizer_high"].params["quantizer"]  # as fine-tuning leaves it
    return SimpleNamespace(spec=make_spec, stage=make_stage, stages=stages)


@pytest.fixture(scope="session")
def pipeline(tiny) -> MusePipeline:
    """The tiny pipeline; what it has compiled serves all tests."""
    return MusePipeline(tiny.stages, {"command": "made by a test"}, max_batch_size=4)


@pytest.fixture(scope="session")
def without_guidance():
    """Makes a stage that isn't meant to be guided of one that is: the same parameters, guidance off by default."""

    def change(stage: checkpoint.Stage) -> checkpoint.Stage:
        sample = dataclasses.replace(stage.spec.sample, guidance_scale=1.0)
        return dataclasses.replace(stage, spec=dataclasses.replace(stage.spec, sample=sample))

    return change


@pytest.fixture
def compiled():
    """A list that gets an entry for every program that XLA compiles during the test."""
    events = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
