"""Guidance: the formula, its sign, the ramps, and the batched evaluation of both branches."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.sampling import guidance


def test_formula_and_its_sign():
    c, u = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    for s in (0.0, 1.0, 2.5, 9.0):
        np.testing.assert_allclose(guidance.guide(jnp.array(c), jnp.array(u), s), u + s * (c - u), atol=1e-5)
        # Muse writes (1 + t) c - t u with t = s - 1.
        np.testing.assert_allclose(guidance.guide(jnp.array(c), jnp.array(u), s), s * c - (s - 1) * u, atol=1e-5)


def test_guidance_moves_away_from_the_unconditional():
    c, u = jnp.array([2.0]), jnp.array([1.0])
    assert guidance.guide(c, u, 3.0) > c


def test_ramps():
    assert guidance.scales("linear", 4, 4.0).tolist() == [1, 2, 3, 4]
    assert guidance.scales("constant", 3, 4.0).tolist() == [4, 4, 4]
    assert guidance.scales("linear", 1, 4.0).tolist() == [4]
    assert guidance.scales("linear", 3, 1.0).tolist() == [1, 1, 1]
    assert guidance.scales("linear", 3, np.array([1.0, 3.0])).tolist() == [[1, 1], [1, 2], [1, 3]]
    # Both ends of an interval are in it, also where floats fall beside them.
    for steps in range(2, 30):
        for k in range(steps):
            time = k / (steps - 1)
            assert (guidance.scales("constant", steps, 3.0, interval=(0.0, time)) == 3).sum() == k + 1
            assert (guidance.scales("constant", steps, 3.0, interval=(time, 1.0)) == 3).sum() == steps - k
    with pytest.raises(ValueError, match="guidance_ramp is 'cosine'; expected one of 'linear'"):
        guidance.scales("cosine", 3, 4.0)


@pytest.mark.parametrize("scale", [3.0, np.array([1.0, 4.0])])
def test_both_branches_in_one_call(scale):
    """The first half of the doubled batch is the conditional one, and each example has its own scale."""
    table = np.random.default_rng(0).normal(size=(2, 9, 6)).astype(np.float32)  # branch, token, code
    tokens = np.array([[1, 8, 3], [4, 4, 0]])

    def both(doubled):
        branch = jnp.repeat(jnp.arange(2), 2)[:, None]
        return jnp.array(table)[branch, doubled]

    logits = guidance.guided(both)(jnp.array(tokens), SimpleNamespace(guidance=jnp.asarray(scale)))
    c, u = table[0][tokens], table[1][tokens]
    np.testing.assert_allclose(logits, u + np.reshape(scale, (-1, 1, 1)) * (c - u), atol=1e-5)
