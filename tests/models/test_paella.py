"""Paella's U-Net: what may influence what, prompts that are blended, and the size that its paper gives."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from muse_jax import specs
from muse_jax.models import paella

TEXT = specs.TextEncoderSpec(vocabulary_size=20, layers=1, width=8, heads=2, head_dim=4, mlp_width=8)
SPEC = specs.PaellaSpec(
    codebook_size=11,
    grid=(4, 4),
    widths=(8, 12),
    down_blocks=(1, 1),
    up_blocks=(1, 2),
    text=TEXT,
    heads=2,
    picture_encoder=True,
)
IDS = jnp.array([[3, 7, 19, 1, 0, 0], [5, 0, 0, 0, 0, 0], [2, 2, 9, 4, 5, 6]])
MASK = jnp.array([[1] * 4 + [0] * 2, [1] + [0] * 5, [1] * 6], bool)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 16)), jnp.int32)
NONE = jnp.full((3, 16), 11)


@functools.cache
def params():
    """Arbitrary parameters, so that no small initial value hides an influence."""
    shapes = nn.unbox(jax.eval_shape(paella.Paella(SPEC).init, jax.random.key(0), TOKENS, IDS, MASK, NONE))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([rng.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in leaves])


@functools.partial(jax.jit, static_argnames="spec")
def run(params, tokens, ids, mask, picture, t, spec):
    return paella.Paella(spec).apply(params, tokens, ids, mask, picture, t)


def logits(tokens=TOKENS, ids=IDS, mask=MASK, picture=NONE, t=0.5, spec=SPEC):
    return run(params(), tokens, ids, mask, picture, jnp.broadcast_to(jnp.float32(t), 3), spec)


def blended(ids, mask, shares):
    return run_blended(params(), ids, mask, shares)


@jax.jit
def run_blended(params, ids, mask, shares):
    apply = functools.partial(paella.Paella(SPEC).apply, params)
    embeddings = apply(ids, mask, method="encode_text")
    condition = apply(embeddings, mask, method="condition").grouped(shares)
    return apply(TOKENS[: len(shares)], condition, jnp.asarray(0.5), method="logits")


def differs(one, other):
    return [bool((np.abs(np.asarray(a) - np.asarray(b)) > 1e-6).any()) for a, b in zip(one, other, strict=True)]


def test_every_input_matters_to_its_own_example_alone():
    plain = logits()
    assert plain.shape == (3, 16, 11)
    assert differs(plain, logits(tokens=TOKENS.at[1, 5].add(1))) == [False, True, False]
    assert differs(plain, logits(ids=IDS.at[2, 3].set(8))) == [False, False, True]
    assert differs(plain, logits(t=jnp.array([0.5, 0.5, 0.6]))) == [False, False, True]
    assert differs(plain, logits(picture=NONE.at[0].set(TOKENS[0]))) == [True, False, False]


def test_a_dropped_text_and_what_is_padded_say_nothing():
    hidden = logits(mask=MASK.at[0].set(False))
    assert differs(hidden, logits(ids=IDS[::-1], mask=MASK.at[0].set(False)))[0] is False
    assert not any(differs(logits(), logits(ids=jnp.where(MASK, IDS, 7))))


def test_blocks_at_full_length_reach_the_whole_picture():
    """The coarsest level sees all of a 4x4 grid."""
    moved = np.abs(np.asarray(logits(tokens=TOKENS.at[0, 0].add(1)) - logits()))[0].max(-1)
    assert (moved > 0).all()


def test_equal_prompts_blend_to_one_of_them_to_the_bit():
    shares = np.random.default_rng(1).dirichlet([1, 1, 1], (1, 16)).astype(np.float32)
    equal = blended(jnp.repeat(IDS[:1], 3, 0), jnp.repeat(MASK[:1], 3, 0), shares)
    only = blended(IDS, MASK, jnp.asarray(np.eye(3, dtype=np.float32)[np.zeros((1, 16), int)]))
    np.testing.assert_array_equal(equal, only)
    assert any(differs(only, blended(IDS, MASK, shares)))


def test_shares_of_an_odd_grid_stay_shares():
    shares = jnp.asarray(np.random.default_rng(1).dirichlet([1, 1], (1, 15)), jnp.float32)
    coarse = paella.Condition(jnp.zeros((1, 2, 8)), (), shares).at(1, (3, 5)).shares
    assert coarse.shape == (1, 2 * 3, 2)
    np.testing.assert_allclose(coarse.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(coarse[0, 0], shares.reshape(3, 5, 2)[:2, :2].mean((0, 1)), rtol=1e-6)


def test_the_same_parameters_serve_other_grids():
    made = logits(
        jnp.zeros((3, 35), jnp.int32), picture=jnp.full((3, 35), 11), spec=dataclasses.replace(SPEC, grid=(5, 7))
    )
    assert made.shape == (3, 35, 11)


def test_the_papers_size():
    """573M without token embedding and classifier, which is how the paper must have counted."""
    spec = dataclasses.replace(
        SPEC,
        codebook_size=8192,
        grid=(32, 32),
        widths=(320, 640, 1280),
        down_blocks=(4, 8, 16),
        up_blocks=(4, 8, 16),
        text=dataclasses.replace(TEXT, width=1024),
        heads=0,
        picture_encoder=False,
    )
    model = paella.Paella(spec)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1024), jnp.int32), IDS[:1], MASK[:1])
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes["params"].items()}
    assert 0.998 * 573e6 < counts["unet"] < 1.002 * 573e6
