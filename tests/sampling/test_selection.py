"""Selection: exact counts by ranks, settled tokens safe, the choice temperature does what it says."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.sampling import selection

lowest = jax.jit(selection.lowest)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_lowest_is_exact_under_ties(levels):
    rng = np.random.default_rng(levels)
    for count in range(0, 33, 4):
        values = rng.integers(levels, size=32).astype(np.float32)
        chosen = np.asarray(lowest(jnp.array(values), jnp.int32(count)))
        assert chosen.sum() == count
        expected = np.zeros(32, bool)
        expected[np.argsort(values, kind="stable")[:count]] = True
        np.testing.assert_array_equal(chosen, expected)


def test_lowest_stands_infinities():
    values = jnp.array([jnp.inf, -jnp.inf, jnp.inf, -jnp.inf, 0.0])
    assert selection.lowest(values, jnp.int32(2)).tolist() == [False, True, False, True, False]


def pick(key, log_prob, fresh, still_masked, temperature):
    drawn = selection.Drawn(jnp.zeros(log_prob.shape, jnp.int32), log_prob, fresh, jnp.zeros(log_prob.shape, bool))
    step = SimpleNamespace(still_masked=jnp.int32(still_masked), choice_temperature=temperature)
    return selection.most_confident(key, drawn, step)


def test_without_noise_the_least_confident_are_masked_again():
    log_prob = jnp.log(jnp.array([0.1, 0.9, 0.3, 0.5]))
    again = pick(jax.random.key(0), log_prob, jnp.ones(4, bool), 2, 0.0)
    assert again.tolist() == [True, False, True, False]


def test_settled_tokens_are_never_masked_again():
    fresh = jnp.arange(40) % 3 == 0  # 14 of 40
    log_prob = jnp.where(fresh, -0.1, -50.0)  # the settled ones look bad
    for seed in range(20):
        again = pick(jax.random.key(seed), log_prob, fresh, 13, 100.0)
        assert int(again.sum()) == 13
        assert not np.any(again & ~fresh)


def test_choice_temperature_is_gumbel_noise_on_the_confidence():
    """Of two places, the first is kept with probability sigmoid((a - b) / temperature)."""
    log_prob, temperature = jnp.array([-1.0, -3.0]), 2.0
    keys = jax.random.split(jax.random.key(0), 4000)
    again = jax.vmap(lambda key: pick(key, log_prob, jnp.ones(2, bool), 1, temperature))(keys)
    expected = 1 / (1 + np.exp(-2.0 / temperature))
    assert abs(float(jnp.mean(again[:, 1])) - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
