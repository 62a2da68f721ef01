"""Muse's token predictors: what may influence what, and the sizes that the paper gives."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax import specs
from muse_jax.models import axes, muse

TEXT = specs.TextEncoderSpec(vocabulary_size=20, layers=1, width=8, heads=2, head_dim=4, mlp_width=8)
BASE = specs.BaseSpec(codebook_size=11, grid=(2, 4), layers=2, width=8, heads=2, mlp_width=12, text=TEXT)
SUPERRES = specs.SuperResSpec(
    codebook_size=11,
    grid=(4, 8),
    low_codebook_size=7,
    low_grid=(2, 4),
    low_layers=1,
    layers=2,
    width=8,
    heads=2,
    mlp_width=12,
    block=(2, 2),
    text=TEXT,
)
IDS = jnp.array([[3, 7, 19, 1, 0, 0], [5, 0, 0, 0, 0, 0], [2, 2, 9, 4, 5, 6]])
MASK = jnp.array([[1] * 4 + [0] * 2, [1] + [0] * 5, [1] * 6], bool)
LOW = jnp.asarray(np.random.default_rng(1).integers(0, 7, (3, 8)), jnp.int32)


def tokens_of(spec):
    places = spec.grid[0] * spec.grid[1]
    return jnp.asarray(np.random.default_rng(0).integers(0, 12, (3, places)), jnp.int32)


def arguments(spec, ids=IDS, mask=MASK, low=LOW):
    rest = (low,) if isinstance(spec, specs.SuperResSpec) else ()
    return (tokens_of(spec), ids, mask, *rest)


class Network:
    """A compiled model with arbitrary parameters, so that no initial zero hides an influence."""

    def __init__(self, spec):
        self.spec, self.model = spec, muse.TokenTransformer(spec)
        shapes = nn.unbox(jax.eval_shape(self.model.init, jax.random.key(0), *arguments(spec)))
        leaves, tree = jax.tree.flatten(shapes)
        rng = np.random.default_rng(0)
        self.params = tree.unflatten([rng.normal(0, 0.4, leaf.shape).astype(np.float32) for leaf in leaves])
        self.run = jax.jit(self.model.apply)

    def __call__(self, *args):
        return np.asarray(self.run(self.params, *args))


@pytest.fixture(scope="module", params=[BASE, SUPERRES], ids=["base", "superres"])
def network(request):
    return Network(request.param)


@pytest.fixture(scope="module")
def superres():
    return Network(SUPERRES)


def test_logits_of_every_place(network):
    logits = network(*arguments(network.spec))
    assert logits.shape == (3, network.spec.grid[0] * network.spec.grid[1], 11)
    assert logits.dtype == np.float32


def test_padded_text_changes_nothing(network):
    logits = network(*arguments(network.spec))
    other = network(*arguments(network.spec, jnp.where(MASK, IDS, 17)))
    np.testing.assert_array_equal(other, logits)
    longer = network(*arguments(network.spec, jnp.pad(IDS, [(0, 0), (0, 3)]), jnp.pad(MASK, [(0, 0), (0, 3)])))
    np.testing.assert_allclose(longer, logits, atol=1e-4)


def test_visible_text_matters_and_a_dropped_one_does_not(network):
    logits = network(*arguments(network.spec))
    other_text = IDS.at[0, 1].set(8)
    changed = np.abs(network(*arguments(network.spec, other_text)) - logits).max((1, 2))
    assert changed[0] > 1e-3
    np.testing.assert_array_equal(changed[1:], 0)
    dropped = MASK.at[0].set(False)
    np.testing.assert_array_equal(
        network(*arguments(network.spec, other_text, dropped)), network(*arguments(network.spec, IDS, dropped))
    )
    assert np.isfinite(network(*arguments(network.spec, IDS, dropped))).all()


def test_the_three_moves_are_the_whole_call(network):
    tokens, ids, mask, *low = arguments(network.spec)

    @jax.jit
    def moves(params):
        embeddings = network.model.apply(params, ids, mask, method="encode_text")
        memory = network.model.apply(params, embeddings, mask, *low, method="condition")
        return network.model.apply(params, tokens, memory, method="logits")

    np.testing.assert_allclose(moves(network.params), network(*arguments(network.spec)), atol=1e-4)


def test_every_place_sees_every_other(network):
    """Within two layers; in multi-axis attention through the block of one and the grid of the other."""
    tokens, *rest = arguments(network.spec)
    logits = network(tokens, *rest)
    for place in (0, tokens.shape[1] - 1):
        other = network(tokens.at[0, place].set((tokens[0, place] + 1) % 11), *rest)
        changed = np.abs(other - logits).max(-1)
        assert (changed[0] > 0).all()
        np.testing.assert_array_equal(changed[1:], 0)


def test_places_are_told_apart(network):
    tokens, *rest = arguments(network.spec)
    logits = network(jnp.full_like(tokens, 11), *rest)[0]
    assert len(np.unique(logits[:, 0].round(4))) == tokens.shape[1]


def test_the_mask_id_is_a_token_of_its_own(network):
    tokens, *rest = arguments(network.spec)
    table = network.params["params"]["embedding"]["tokens"]
    assert table.shape == (12, 8)
    masked = network(jnp.full_like(tokens, 11), *rest)
    assert all(np.abs(network(jnp.full_like(tokens, code), *rest) - masked).max() > 1e-3 for code in (0, 10))


def test_low_resolution_tokens_matter_to_their_own_example(superres):
    logits = superres(*arguments(SUPERRES))
    changed = np.abs(superres(*arguments(SUPERRES, low=LOW.at[1, 5].set((LOW[1, 5] + 1) % 7))) - logits).max(-1)
    assert (changed[1] > 0).all()
    np.testing.assert_array_equal(changed[[0, 2]], 0)


def test_bfloat16_gives_float32_logits_near_those_of_float32():
    whole = Network(BASE)
    half = muse.TokenTransformer(dataclasses.replace(BASE, dtype="bfloat16"))
    logits = jax.jit(half.apply)(whole.params, *arguments(BASE))
    assert logits.dtype == jnp.float32
    want = whole(*arguments(BASE))
    assert np.abs(logits - want).mean() < 0.05 * np.abs(want).mean()


def test_every_parameter_has_known_axes(network):
    boxed = jax.eval_shape(network.model.init, jax.random.key(0), *arguments(network.spec))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for path, box in leaves:
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim, path
        assert set(box.names) <= set(axes.ALL), path


def test_the_papers_base_model_has_3_25_billion_parameters():
    """48 layers of 16 d^2, and tables, head and projections (Muse, appendix A.2, without T5-XXL)."""
    text = specs.TextEncoderSpec(vocabulary_size=32128, layers=1, width=4096, heads=64, head_dim=64, mlp_width=10240)
    spec = specs.BaseSpec(codebook_size=8192, grid=(16, 16), layers=48, width=2048, heads=32, mlp_width=8192, text=text)
    shapes = jax.eval_shape(
        muse.TokenTransformer(spec).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 256), jnp.int32),
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
        jax.ShapeDtypeStruct((1, 8), bool),
    )["params"]
    count = sum(
        leaf.size for name, part in nn.unbox(shapes).items() if name != "text_encoder" for leaf in jax.tree.leaves(part)
    )
    assert count == pytest.approx(3.26e9, rel=0.01)
