"""Attention, multi-axis attention and the scanned stack against plain loops."""

import itertools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from muse_jax.models import layers, transformer

GRID, BLOCK = (4, 6), (2, 3)
FLOAT32 = jnp.dtype("float32")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def attention(q, k, v, bias=0.0):
    """One example and one head: [n, d], [m, d], [m, d]."""
    scores = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ np.asarray(v, np.float64)


def test_attention_equals_the_reference():
    q, k, v = draw(2, 5, 3, 4), draw(2, 7, 3, 4, seed=1), draw(2, 7, 3, 4, seed=2)
    mask = jnp.array([[1, 1, 1, 0, 1, 0, 0], [1] * 7], bool)
    bias = draw(3, 5, 7, seed=3)
    got = jax.jit(layers.attend)(q, k, v, mask, bias)
    for b, h in itertools.product(range(2), range(3)):
        seen = np.flatnonzero(mask[b])
        want = attention(q[b, :, h], k[b, seen, h], v[b, seen, h], bias[h][:, seen])
        np.testing.assert_allclose(got[b, :, h], want, atol=1e-5)


def rounded(x):
    """To bfloat16's 8 bits."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_products_round_their_factors_where_asked_to():
    x, kernel, cotangent = draw(2, 3, 40), draw(40, 7, seed=1), draw(2, 3, 7, seed=2)

    def both(x, kernel):
        y, back = jax.vjp(layers.product, x, kernel)
        return y, *back(cotangent)

    with jax.default_matmul_precision("bfloat16"):
        found = jax.jit(both)(x, kernel)
    factors = [rounded(a).reshape(-1, a.shape[-1]) for a in (x, kernel, cotangent)]
    rows, columns, g = factors
    wanted = ((rows @ columns).reshape(2, 3, 7), (g @ columns.T).reshape(2, 3, 40), rows.T @ g)
    for one, other, exact in zip(found, wanted, jax.jit(both)(x, kernel), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert 1e-4 < np.abs(one - exact).max() < 0.1, "without the setting nothing is rounded"


ODD_PRODUCTS = """
import itertools, jax, jax.numpy as jnp
from muse_jax.models import layers

def loss(x, kernel, other):  # transposed, so that XLA would have factors and results lie in columns
    return jnp.sum(jnp.sin(layers.product(layers.product(x, kernel).T, other).T))

step = jax.jit(jax.grad(loss, (0, 1, 2)))
with jax.default_matmul_precision("bfloat16"):
    for rows, inner, columns in itertools.product((1, 3, 256), (1, 5, 64), (1, 7, 128)):
        jax.block_until_ready(step(jnp.ones((rows, inner)), jnp.ones((inner, columns)), jnp.ones((rows, 96))))
"""


def test_products_of_any_shape_are_rounded_with_all_of_xlas_optimizations(as_users):
    """XLA's CPU backend fails while it runs where it chose a layout for which it has no product in bfloat16."""
    command = [sys.executable, "-c", ODD_PRODUCTS]
    done = subprocess.run(command, env=as_users, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    q, k, v = draw(2, 3, 1, 4), draw(2, 5, 1, 4, seed=1), draw(2, 5, 1, 4, seed=2)
    mask = jnp.array([[False] * 5, [True] * 5])
    np.testing.assert_array_equal(layers.attend(q, k, v, mask)[0], 0)
    gradients = jax.grad(lambda *a: jnp.sum(layers.attend(*a, mask) ** 2), (0, 1, 2))(q, k, v)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[1]).max() > 0


def test_blocks_are_squares_of_the_grid_and_come_back():
    places = jnp.arange(24.0).reshape(1, 24)
    blocks = layers.to_blocks(places, GRID, BLOCK)
    np.testing.assert_array_equal(blocks[0, 0], [0, 1, 2, 6, 7, 8])
    np.testing.assert_array_equal(blocks[0, 3], [15, 16, 17, 21, 22, 23])
    np.testing.assert_array_equal(layers.from_blocks(blocks, GRID, BLOCK), places)


def test_multi_axis_attention_equals_the_reference():
    """The first half of the heads sees its own block; the second its own position of every block."""
    q, k, v = (draw(2, 24, 4, 3, seed=seed) for seed in range(3))
    got = jax.jit(lambda *a: layers.multi_axis_attend(*a, GRID, BLOCK))(q, k, v)
    rows, columns = np.divmod(np.arange(24), 6)
    block = (rows // 2, columns // 3)
    inside = (rows % 2, columns % 3)
    for b, n, h in itertools.product(range(2), range(24), range(4)):
        same = block if h < 2 else inside
        seen = np.flatnonzero((same[0] == same[0][n]) & (same[1] == same[1][n]))
        assert len(seen) == (6 if h < 2 else 4)
        want = attention(q[b, n : n + 1, h], k[b, seen, h], v[b, seen, h])[0]
        np.testing.assert_allclose(got[b, n, h], want, atol=1e-5)


@pytest.mark.parametrize(("keys", "unit", "offsets"), [((4, 6), (1, 1), 7 * 11), ((2, 2), (2, 3), 6 * 9)])
def test_a_relative_bias_depends_on_the_offset_alone(keys, unit, offsets):
    """Also between the places of a fine grid and of a coarse one, whose squares are `unit` places wide."""
    bias = layers.RelativeBias(2, GRID, keys).apply({"params": {"table": draw(2, offsets)}})
    found = {}
    for n, m in itertools.product(range(24), range(keys[0] * keys[1])):
        offset = (n // 6 - m // keys[1] * unit[0], n % 6 - m % keys[1] * unit[1])
        np.testing.assert_array_equal(found.setdefault(offset, bias[:, n, m]), bias[:, n, m])
    assert len({tuple(np.asarray(value)) for value in found.values()}) == len(found) == offsets


def test_cross_attention_is_biased_towards_keys_that_have_a_place_and_no_others():
    """Two keys on a 1x2 grid over the queries' 2x2, then one without a place."""
    x, keys, values = draw(1, 4, 8), draw(1, 3, 2, 4, seed=1), draw(1, 3, 2, 4, seed=2)
    mask = jnp.ones((1, 3), bool)
    module = layers.CrossAttention(2, grids=((2, 2), (1, 2)), dtype=FLOAT32)
    params = module.init(jax.random.key(0), x, keys, values, mask)["params"]
    apply = jax.jit(lambda table: module.apply({"params": {**params, "bias": {"table": table}}}, x, keys, values, mask))
    plain = layers.CrossAttention(2, dtype=FLOAT32)
    without = {name: value for name, value in params.items() if name != "bias"}
    start = nn.unbox(params["bias"]["table"])
    np.testing.assert_allclose(apply(start), plain.apply({"params": without}, x, keys, values, mask), atol=1e-6)
    biased = apply(jnp.full_like(start, 50.0))  # the key without a place loses all weight
    want = plain.apply({"params": without}, x, keys, values, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(biased, want, atol=1e-5)


def stack(**options):
    return transformer.Stack(**{"depth": 3, "heads": 2, "mlp_width": 12, "grid": GRID, "dtype": FLOAT32, **options})


def arbitrary(module, *args):
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(3)
    return tree.unflatten([rng.normal(0, 0.4, leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def memory():
    mask = jnp.array([[True, True, False], [True, False, False]])
    return transformer.Memory(draw(3, 2, 3, 2, 4, seed=5), draw(3, 2, 3, 2, 4, seed=6), mask)


def test_the_scan_is_a_loop_over_layers(memory):
    x = draw(2, 24, 8)
    options = {"qk_norm": True, "relative": True, "block": BLOCK, "memory_grid": (1, 2)}
    params = arbitrary(stack(**options), x, memory)
    got = jax.jit(stack(**options).apply)(params, x, memory)
    layer = transformer.Layer(2, 12, depth=3, cross=True, grid=GRID, dtype=FLOAT32, **options)
    one = jax.jit(
        lambda own, x, *memory_of: layer.apply({"params": own}, (x, None), *memory_of, None, memory.mask, True)[0][0]
    )
    for i in range(3):
        own = jax.tree.map(lambda p, i=i: p[i], params["params"]["layers"])
        x = one(own, x, memory.keys[i], memory.values[i])
    np.testing.assert_allclose(got, x, atol=1e-4)


def test_unrolling_and_remat_change_no_value(memory):
    x = draw(2, 24, 8)
    params = arbitrary(stack(), x, memory)

    def gradients(**options):
        def loss(params):
            return jnp.sum(stack(**options).apply(params, x, memory) ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    want = gradients()
    for options in ({"unroll": 3}, {"remat": "full"}, {"remat": "dots_saveable"}):
        for g, w in zip(gradients(**options), want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3, err_msg=str(options))


def test_a_remat_policy_that_is_none_is_refused_by_name(memory):
    with pytest.raises(ValueError, match=r"model\.remat is 'dots'"):
        jax.eval_shape(stack(remat="dots").init, jax.random.key(0), draw(2, 24, 8), memory)


def test_without_memory_there_is_no_cross_attention():
    x = draw(2, 24, 8)
    params = arbitrary(stack(), x)["params"]["layers"]
    assert not [name for name in params if name.startswith("cross")]


def test_dropout_acts_only_where_asked():
    x = draw(2, 24, 8)
    params = arbitrary(stack(), x)
    run = jax.jit(lambda key: stack(dropout=0.5).apply(params, x, None, False, rngs={"dropout": key}))
    still = stack(dropout=0.5).apply(params, x, None, True)
    np.testing.assert_allclose(still, stack().apply(params, x), atol=1e-5)
    one, same, two = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - two).max() > 0.1
    assert np.abs(one - still).max() > 0.1


def test_memory_has_keys_and_values_of_each_layer():
    x, mask = draw(2, 3, 5), jnp.ones((2, 3), bool)
    module = transformer.MemoryProjection(layers=3, heads=2, head_dim=4, dtype=FLOAT32)
    params = arbitrary(module, x, mask)
    got = module.apply(params, x, mask)
    for i in range(3):
        for name, value in (("key", got.keys), ("value", got.values)):
            want = np.einsum("bmi,ihd->bmhd", x, params["params"][name][i])
            np.testing.assert_allclose(value[i], want, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_attention_is_the_plain_one(monkeypatch, masked):
    """With XLA in the place of cuDNN's kernel: shapes, biases, and zeros for a query that sees nothing."""
    fused = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **s: fused(*x, **{**s, "implementation": "xla"}))
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, n, 4, 8)) for i, n in enumerate((5, 6, 6)))
    mask = jnp.ones((2, 3, 6), bool).at[0, 0].set(False).at[1, :, 4:].set(False) if masked else None
    bias = jax.random.normal(jax.random.key(3), (4, 5, 6))
    found, expected = (jax.jit(layers.attend, static_argnums=5)(q, k, v, mask, bias, name) for name in ("cudnn", "xla"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not masked or not np.any(found[0, 0])
