"""Losses against plain NumPy, and which way they push."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.tasks import losses
from muse_jax.tasks.task import Mean


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32), jnp.asarray(rng.integers(0, 6, (3, 4)), jnp.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(drawn, smoothing):
    logits, labels = drawn
    log_p = np.asarray(logits) - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(6)[labels] * (1 - smoothing) + smoothing / 6
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, smoothing), -(target * log_p).sum(-1), rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(losses.cross_entropy(x, labels, smoothing)))(logits)
    np.testing.assert_allclose(gradient, np.exp(log_p) - target, atol=1e-5)


def test_cross_entropy_of_large_logits_is_finite():
    assert losses.cross_entropy(jnp.array([1e4, -1e4]), jnp.array(1)) == 2e4


def test_accuracy(drawn):
    logits, labels = drawn
    np.testing.assert_array_equal(losses.accuracy(logits, labels), np.argmax(logits, -1) == labels)


def test_an_example_counts_once_however_many_places_it_has():
    values = jnp.array([[1.0, 3.0, 100.0], [7.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(losses.weighted_example_mean(values, weights), [2, 7, 0])


def test_buckets_of_the_mask_ratio_hold_every_example_once():
    ratios = jnp.array([0.01, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0])
    values = jnp.arange(7.0)
    found = losses.by_ratio("x", values, ratios)
    assert {name: float(mean.weight) for name, mean in found.items()} == {
        "x/ratio_0.00_0.25": 2,
        "x/ratio_0.25_0.50": 2,
        "x/ratio_0.50_0.75": 1,
        "x/ratio_0.75_1.00": 2,
    }
    assert sum(float(mean.total) for mean in found.values()) == values.sum()
    assert found["x/ratio_0.75_1.00"].value() == 5.5


def test_means_add_up_as_if_taken_together():
    values, weights = jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 0.0, 3.0])
    parts = Mean.of(values[:1], weights[:1]) + Mean.of(values[1:], weights[1:])
    assert parts.value() == Mean.of(values, weights).value() == pytest.approx(19 / 4)
    assert np.isnan(Mean.of(values, jnp.zeros(3)).value())


def test_entropy_of_counts():
    counts = np.array([3.0, 0.0, 1.0, 4.0])
    p = counts[counts > 0] / 8
    assert losses.entropy_of_counts(jnp.array(counts)) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    assert np.isfinite(jax.grad(losses.entropy_of_counts)(jnp.array(counts))).all()
    assert losses.entropy_of_counts(jnp.zeros(4)) == 0


def test_the_two_sides_of_the_hinge():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.5])
    assert losses.hinge_discriminator(real, fake) == pytest.approx(0.5 * (0.25 + 0.75))
    by_real, by_fake = jax.grad(losses.hinge_discriminator, (0, 1))(real, fake)
    np.testing.assert_allclose(by_real, [0, -0.25])  # real up, until 1
    np.testing.assert_allclose(by_fake, [0, 0.25])  # fake down, until -1
    np.testing.assert_allclose(jax.grad(losses.hinge_generator)(fake), [-0.5, -0.5])  # the generator: up


def test_the_adaptive_weight_balances_the_gradients():
    one, two = (
        {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])},
        {"a": jnp.array([0.0, 0.1]), "b": jnp.zeros((1, 1))},
    )
    assert losses.adaptive_weight(one, two) == pytest.approx(5 / (0.1 + 1e-4))
    assert losses.adaptive_weight(one, jax.tree.map(jnp.zeros_like, two)) == 1e4  # at most
    assert jax.grad(lambda x: losses.adaptive_weight(x, two["a"]))(one["a"]).any() == 0  # a number, not a loss
