"""How tokens and texts are corrupted: distributions, exact counts, and keys of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from muse_jax.sampling import schedules
from muse_jax.tasks import corruption

MANY = 20_000


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(7), MANY)


def test_the_mask_ratio_has_muses_density(keys):
    """(2 / pi) (1 - r^2)^(-1/2), whose distribution function is 1 - (2 / pi) arccos r; mean 2 / pi."""
    ratio = jax.jit(jax.vmap(lambda key: corruption.mask_ratio(key, schedules.cosine, 256)))(keys)
    assert ratio.mean() == pytest.approx(2 / np.pi, abs=3 * float(ratio.std()) / MANY**0.5)
    assert stats.kstest(np.asarray(ratio, np.float64), lambda r: 1 - 2 / np.pi * np.arccos(r)).pvalue > 1e-3
    assert 0 < ratio.min() < 0.01
    assert 0.999 < ratio.max() <= 1


def test_a_least_mask_ratio_is_kept(keys):
    ratio = jax.vmap(lambda key: corruption.mask_ratio(key, schedules.cosine, 256, 0.5))(keys)
    assert ratio.min() == 0.5
    assert (ratio == 0.5).mean() == pytest.approx(1 / 3, abs=0.01)  # cos(pi u / 2) < 1/2 for u > 2/3


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 1), (0.01, 1), (0.5, 5), (0.56, 6), (1.0, 9)])
def test_exactly_so_many_places_are_masked(keys, ratio, count):
    masks = jax.vmap(lambda key: corruption.random_mask(key, jnp.float32(ratio), 9))(keys[:100])
    np.testing.assert_array_equal(masks.sum(-1), count)


def test_every_place_is_masked_as_often(keys):
    masks = jax.vmap(lambda key: corruption.random_mask(key, jnp.float32(0.3), 10))(keys)
    np.testing.assert_allclose(masks.mean(0), 0.3, atol=4 * (0.21 / MANY) ** 0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_share_of_dropped_texts(keys, share):
    """As many as asked, within three standard deviations; whole texts, and never the padding brought back."""
    mask = jnp.array([True, True, False])
    seen = jax.vmap(lambda key: corruption.drop_text(key, mask, share))(keys)
    np.testing.assert_array_equal(seen[:, 0], seen[:, 1])
    assert not seen[:, 2].any()
    assert 1 - seen[:, 0].mean() == pytest.approx(share, abs=3 * (share * (1 - share) / MANY) ** 0.5 + 1e-6)


def test_the_share_of_replaced_tokens(keys):
    tokens = jnp.full(50, 3, jnp.int32)
    replaced = jax.vmap(lambda key: corruption.replace_some(key, tokens, 0.4, 8))(keys[:5000])
    shares = (replaced != 3).mean(-1) * 8 / 7  # an eighth of the random tokens is what was there
    assert shares.mean() == pytest.approx(0.2, abs=0.01)
    assert np.quantile(shares, [0.05, 0.95]) == pytest.approx([0.02, 0.38], abs=0.06)
    assert set(np.unique(replaced)) == set(range(8))
    np.testing.assert_array_equal(corruption.replace_some(keys[0], tokens, 0.0, 8), tokens)


def test_keys_go_by_the_examples_id_alone():
    key, ids = jax.random.key(0), jnp.array([5, 9, 700])
    data = jax.random.key_data(corruption.example_keys(key, ids))
    np.testing.assert_array_equal(jax.random.key_data(corruption.example_keys(key, ids[::-1])), data[::-1])
    assert len(np.unique(data, axis=0)) == 3
    assert (data != jax.random.key_data(corruption.example_keys(jax.random.key(1), ids))).any(-1).all()
