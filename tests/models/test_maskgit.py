"""MaskGIT's model: the class is seen by every place, and no class is a class of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from muse_jax import specs
from muse_jax.models import predictors

SPEC = specs.MaskGITSpec(
    codebook_size=11, grid=(2, 3), classes=4, layers=2, width=16, heads=2, mlp_width=16, relative_positions=True
)


@pytest.fixture(scope="module")
def network():
    """(predict(params, tokens, ids, mask) -> logits, random parameters)."""
    model = predictors.from_spec(SPEC)
    args = jnp.zeros((1, 6), jnp.int32), jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    shapes = jax.eval_shape(lambda: meta.unbox(model.init(jax.random.key(0), *args)["params"]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32), shapes)
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args)), params


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 12, (4, 6)), jnp.int32)  # 11 is masked
IDS = jnp.arange(1, 5)[:, None]
SEEN = jnp.ones((4, 1), bool)


def test_logits_of_every_place_and_none_of_the_class(network):
    predict, params = network
    assert params["classes"].shape == (5, 16), "a row for no class"
    assert predict(params, TOKENS, IDS, SEEN).shape == (4, 6, 11)


def test_the_class_moves_the_logits_of_all_places(network):
    predict, params = network
    same = jnp.broadcast_to(TOKENS[:1], TOKENS.shape)
    logits = np.asarray(predict(params, same, IDS, SEEN))
    for other in logits[1:]:
        assert np.all(np.abs(other - logits[0]).max(axis=-1) > 1e-3)


def test_a_hidden_class_is_no_class_whichever_it_was(network):
    predict, params = network
    none = predict(params, TOKENS, jnp.zeros_like(IDS), ~SEEN)
    np.testing.assert_array_equal(predict(params, TOKENS, IDS, ~SEEN), none)
    np.testing.assert_array_equal(predict(params, TOKENS, jnp.zeros_like(IDS), SEEN), none)


def test_the_class_has_no_place(network):
    """With all tokens, positions and offset biases alike, every place has the same logits: nothing tells them apart."""
    predict, params = network
    flat = {**params, "embedding": {**params["embedding"]}}
    flat["embedding"]["rows"], flat["embedding"]["columns"] = (
        jnp.ones_like(params["embedding"][n]) for n in ("rows", "columns")
    )
    bias = flat["stack"]["layers"]["self_attention"]["bias"]["table"]
    layers = flat["stack"]["layers"]
    attention = {**layers["self_attention"], "bias": {"table": jnp.full_like(bias, 3.0)}}
    flat["stack"] = {"layers": {**layers, "self_attention": attention}}
    logits = np.asarray(predict(flat, jnp.full((4, 6), 5), IDS, SEEN))
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:, :1], logits.shape), rtol=1e-4, atol=1e-5)
    # The biases are of places alone: towards the class there is none, so that their sum is seen.
    zero = {**attention, "bias": {"table": jnp.zeros_like(bias)}}
    flat["stack"] = {"layers": {**layers, "self_attention": zero}}
    assert np.abs(np.asarray(predict(flat, jnp.full((4, 6), 5), IDS, SEEN)) - logits).max() > 1e-3


def test_conditioning_once_is_conditioning_every_time(network):
    predict, params = network
    apply = functools.partial(predictors.from_spec(SPEC).apply, {"params": params})

    @jax.jit
    def in_moves(tokens, ids, mask):
        memory = apply(apply(ids, mask, method="encode_text"), mask, None, method="condition")
        return apply(tokens, memory, method="logits")

    np.testing.assert_allclose(in_moves(TOKENS, IDS, SEEN), predict(params, TOKENS, IDS, SEEN), rtol=1e-5, atol=1e-5)
