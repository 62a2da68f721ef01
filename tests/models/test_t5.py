"""T5's encoder against a plain NumPy one, and what it promises about padding."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.models import axes, t5

SMALL = {
    "vocabulary_size": 23,
    "layers": 3,
    "width": 8,
    "heads": 2,
    "head_dim": 6,  # heads * head_dim differs from the width
    "mlp_width": 12,
    "position_buckets": 8,
    "position_max_distance": 10,
}
IDS = np.array([[3, 7, 22, 1, 0, 0], [5, 0, 0, 0, 0, 0], [4, 9, 9, 9, 2, 11], [8, 8, 8, 8, 8, 8]], np.int32)
MASK = np.array([[1] * 4 + [0] * 2, [1] + [0] * 5, [1] * 6, [0] * 6], bool)


@pytest.fixture(scope="module")
def params():
    """Parameters drawn at random, so that no initial zero or one hides a mistake."""
    shapes = jax.eval_shape(t5.T5Encoder(**SMALL).init, jax.random.key(0), IDS, MASK)["params"]
    leaves, tree = jax.tree.flatten(nn.unbox(shapes))
    rng = np.random.default_rng(0)
    return tree.unflatten([rng.normal(0, 0.4, leaf.shape).astype(np.float32) for leaf in leaves])


@functools.cache
def compiled(**options):
    encoder = t5.T5Encoder(**{**SMALL, **options})

    def run(params, ids, mask, key):
        rngs = None if key is None else {"dropout": key}
        return encoder.apply({"params": params}, ids, mask, deterministic=key is None, rngs=rngs)

    return jax.jit(run)


def apply(params, ids=IDS, mask=MASK, key=None, **options):
    """The encoder's output; with a key, with dropout."""
    return compiled(**options)(params, ids, mask, key)


def bucket(offset, buckets, max_distance):
    """One relative position, as T5's paper and its first code have it."""
    result = 0
    buckets //= 2
    if offset > 0:
        result = buckets
    distance = abs(offset)
    exact = buckets // 2
    if distance < exact:
        return result + distance
    far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-6)
    return result + min(far, buckets - 1)


def reference(params, ids, mask, gated=True, qk_norm=False):
    """The encoder as loops over examples, layers and heads."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    encoder, layers = params["encoder"], params["encoder"]["layers"]
    out = np.zeros((*ids.shape, SMALL["width"]))
    for b, seen in enumerate(mask):
        x = params["token_embedder"]["embedding"][ids[b][seen]].astype(np.float64)
        where = np.flatnonzero(seen)
        for i in range(SMALL["layers"]):
            kernel = lambda *path, i=i: get(layers, *path)[i]  # noqa: E731
            y = norm(x, kernel("pre_attention_layer_norm", "scale"))
            heads = []
            for h in range(SMALL["heads"]):
                part = slice(h * SMALL["head_dim"], (h + 1) * SMALL["head_dim"])
                q, k, v = (y @ kernel("attention", n, "kernel")[:, part] for n in ("query", "key", "value"))
                if qk_norm:
                    q = norm(q, kernel("attention", "query_norm", "scale")) * SMALL["head_dim"] ** -0.5
                    k = norm(k, kernel("attention", "key_norm", "scale"))
                bias = [
                    [encoder["relpos_bias"]["rel_embedding"][h, bucket(s - t, 8, 10)] for s in where] for t in where
                ]
                weights = np.exp(q @ k.T + np.array(bias).reshape(len(where), len(where)))
                heads.append(weights / weights.sum(-1, keepdims=True) @ v)
            x = x + np.concatenate(heads, -1) @ kernel("attention", "out", "kernel")
            y = norm(x, kernel("pre_mlp_layer_norm", "scale"))
            if gated:
                hidden = gelu(y @ kernel("mlp", "wi_0", "kernel")) * (y @ kernel("mlp", "wi_1", "kernel"))
            else:
                hidden = np.maximum(y @ kernel("mlp", "wi", "kernel"), 0)
            x = x + hidden @ kernel("mlp", "wo", "kernel")
        out[b, seen] = norm(x, encoder["encoder_norm"]["scale"])
    return out


def get(tree, *path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 10), (64, 512)])
def test_buckets_equal_the_reference(buckets, max_distance):
    length = max_distance + 9
    got = np.asarray(t5.relative_position_buckets(length, length, buckets, max_distance))
    want = [[bucket(k - q, buckets, max_distance) for k in range(length)] for q in range(length)]
    np.testing.assert_array_equal(got, want)


def test_buckets_have_the_values_of_the_released_models():
    # From T5's 32 buckets and 128 positions: 8 exact ones a side, then 12/16/23/32/46/64/91 open a new one.
    row = np.asarray(t5.relative_position_buckets(200, 200, 32, 128))[199]
    assert [
        int(row[199 - d]) for d in (0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 199)
    ] == [*(0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15)]
    column = np.asarray(t5.relative_position_buckets(200, 200, 32, 128))[0]
    assert [int(column[d]) for d in (1, 7, 8, 16, 128, 199)] == [17, 23, 24, 26, 31, 31]


@pytest.mark.parametrize("gated", [True, False])
def test_equals_the_reference(params, gated):
    if not gated:
        mlp = dict(params["encoder"]["layers"]["mlp"])
        mlp = {"wi": mlp["wi_0"], "wo": mlp["wo"]}
        layers = {**params["encoder"]["layers"], "mlp": mlp}
        params = {**params, "encoder": {**params["encoder"], "layers": layers}}
    got = apply(params, gated=gated)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(params, IDS, MASK, gated), atol=2e-5)


def test_normed_logits_equal_the_reference_and_stay_with_growing_weights(params):
    rng = np.random.default_rng(1)
    attention = dict(params["encoder"]["layers"]["attention"])
    for name in ("query", "key"):
        attention[f"{name}_norm"] = {"scale": rng.normal(1, 0.2, (3, 6)).astype(np.float32)}

    def run(scale):
        grown = {**attention, **{n: {"kernel": attention[n]["kernel"] * scale} for n in ("query", "key")}}
        layers = {**params["encoder"]["layers"], "attention": grown}
        changed = {**params, "encoder": {**params["encoder"], "layers": layers}}
        return np.asarray(apply(changed, qk_norm=True)), changed

    got, changed = run(1.0)
    np.testing.assert_allclose(got, reference(changed, IDS, MASK, True, qk_norm=True), atol=2e-5)
    np.testing.assert_allclose(run(30.0)[0], got, atol=1e-4)


def test_padding_changes_nothing(params):
    visible = np.asarray(apply(params))[MASK]
    other = np.where(MASK, IDS, 17)
    np.testing.assert_array_equal(np.asarray(apply(params, other))[MASK], visible)
    longer = np.pad(IDS, [(0, 0), (0, 5)], constant_values=2)
    got = np.asarray(apply(params, longer, np.pad(MASK, [(0, 0), (0, 5)])))
    np.testing.assert_allclose(got[:, :6][MASK], visible, atol=1e-5)


def test_no_gradient_from_padding(params):
    ids = np.where(MASK, IDS, 17)
    assert not (ids[MASK] == 17).any()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, ids)[MASK] ** 3)))(params)["token_embedder"]["embedding"]
    assert np.abs(gradient[17]).max() == 0
    assert np.abs(gradient[3]).max() > 0


def test_a_prompt_without_visible_text_is_zero_and_has_finite_gradients(params):
    value, gradients = jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply(p)[3] ** 2)))(params)
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.isfinite(apply(params)).all()


def test_dropout_acts_only_where_asked(params):
    still = apply(params)
    np.testing.assert_array_equal(apply(params, dropout=0.5), still)
    one, same, two = (apply(params, dropout=0.5, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - still).max() > 0.1
    assert np.abs(one - two).max() > 0.1


def test_unrolling_and_remat_change_no_value(params):
    def gradients(**options):
        return jax.jit(jax.grad(lambda p: jnp.sum(apply(p, **options) ** 2)))(params)

    want = jax.tree.leaves(gradients())
    for options in ({"unroll": 3}, {"remat": "full"}, {"remat": "dots_saveable"}):
        for g, w in zip(jax.tree.leaves(gradients(**options)), want, strict=True):
            np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4, err_msg=str(options))


def test_bfloat16_keeps_the_residual_stream_in_float32(params):
    got = apply(params, dtype="bfloat16")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, apply(params), atol=0.15)
    # With branches that add nothing, what comes out is the embedding, unrounded.
    quiet = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros_like(x) if path[-2].key in ("out", "wo") else x, params
    )
    np.testing.assert_array_equal(apply(quiet, dtype="bfloat16"), apply(quiet))


def test_parameters_have_names_and_axes():
    boxed = jax.eval_shape(t5.T5Encoder(**SMALL).init, jax.random.key(0), IDS, MASK)["params"]
    found = {}
    for path, box in jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
        found["/".join(key.key for key in path)] = (box.names, box.value.shape)
    layers = "encoder/layers"
    assert found == {
        "token_embedder/embedding": ((axes.VOCAB, axes.EMBED), (23, 8)),
        "encoder/relpos_bias/rel_embedding": ((axes.HEADS, axes.BUCKETS), (2, 8)),
        "encoder/encoder_norm/scale": ((axes.EMBED,), (8,)),
        f"{layers}/pre_attention_layer_norm/scale": ((axes.LAYERS, axes.EMBED), (3, 8)),
        f"{layers}/pre_mlp_layer_norm/scale": ((axes.LAYERS, axes.EMBED), (3, 8)),
        **{
            f"{layers}/attention/{name}/kernel": ((axes.LAYERS, axes.EMBED, axes.HEADS), (3, 8, 12))
            for name in ("query", "key", "value")
        },
        f"{layers}/attention/out/kernel": ((axes.LAYERS, axes.HEADS, axes.EMBED), (3, 12, 8)),
        f"{layers}/mlp/wi_0/kernel": ((axes.LAYERS, axes.EMBED, axes.MLP), (3, 8, 12)),
        f"{layers}/mlp/wi_1/kernel": ((axes.LAYERS, axes.EMBED, axes.MLP), (3, 8, 12)),
        f"{layers}/mlp/wo/kernel": ((axes.LAYERS, axes.MLP, axes.EMBED), (3, 12, 8)),
    }


def test_the_initial_query_carries_the_missing_scale():
    sizes = {**SMALL, "layers": 2, "width": 64, "heads": 4, "head_dim": 16}
    params = nn.unbox(jax.jit(t5.T5Encoder(**sizes).init)(jax.random.key(0), IDS, MASK))["params"]
    attention = params["encoder"]["layers"]["attention"]
    ratio = np.std(attention["key"]["kernel"]) / np.std(attention["query"]["kernel"])
    assert ratio == pytest.approx(4.0, rel=0.05)
    first, second = attention["key"]["kernel"]
    assert np.abs(first - second).max() > 0.01, "layers share their initial values"
