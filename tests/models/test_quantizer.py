"""Vector quantization, its gradients and the revival of codes against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.models import quantizer


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(7, 4)).astype(np.float32)


def distances(latents, codebook):
    return np.square(latents[..., None, :] - codebook).sum(-1)


def test_the_nearest_code_is_chosen(drawn):
    latents, codebook = drawn
    chosen = quantizer.quantize(jnp.array(latents), jnp.array(codebook))
    np.testing.assert_array_equal(chosen.ids, distances(latents, codebook).argmin(-1))
    np.testing.assert_allclose(chosen.codes, codebook[chosen.ids], rtol=1e-6)
    least = distances(latents, codebook).min(-1) / 4
    np.testing.assert_allclose(chosen.codebook_loss, least, rtol=1e-4)
    np.testing.assert_allclose(chosen.commitment_loss, least, rtol=1e-4)


def test_of_equal_codes_the_first_is_chosen():
    codebook = jnp.array([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    assert quantizer.nearest(jnp.array([0.9, 0.1]), codebook) == 1


def test_gradients(drawn):
    """Straight through for codes; the codebook's loss moves chosen codes alone, commitment latents alone."""
    latents, codebook = drawn
    weights = np.random.default_rng(1).normal(size=latents.shape).astype(np.float32)
    ids = distances(latents, codebook).argmin(-1)
    assert len(np.unique(ids)) < len(codebook)

    def part(name, scale):
        def value(latents, codebook):
            return jnp.sum(getattr(quantizer.quantize(latents, codebook), name) * scale)

        return jax.grad(value, (0, 1))(jnp.array(latents), jnp.array(codebook))

    by_latents, by_codebook = part("codes", weights)
    np.testing.assert_allclose(by_latents, weights, rtol=1e-6)
    np.testing.assert_array_equal(by_codebook, 0)

    by_latents, by_codebook = part("codebook_loss", 1.0)
    expected = np.zeros_like(codebook)
    np.add.at(expected, ids, (codebook[ids] - latents) * 2 / 4)
    np.testing.assert_array_equal(by_latents, 0)
    np.testing.assert_allclose(by_codebook, expected, atol=1e-6)

    by_latents, by_codebook = part("commitment_loss", 1.0)
    np.testing.assert_allclose(by_latents, (latents - codebook[ids]) * 2 / 4, atol=1e-6)
    np.testing.assert_array_equal(by_codebook, 0)


def test_normalized_codes_go_by_the_angle(drawn):
    latents, codebook = drawn
    params = {"params": {"codebook": jnp.array(codebook), "unused": jnp.zeros(7)}}
    module = quantizer.Quantizer(7, 4, normalize=True)
    chosen = module.apply(params, jnp.array(latents) * 100)
    cosine = np.einsum("...d,kd->...k", latents, codebook / np.linalg.norm(codebook, axis=-1, keepdims=True))
    np.testing.assert_array_equal(chosen.ids, cosine.argmax(-1))
    np.testing.assert_allclose(np.linalg.norm(chosen.codes, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(module.apply(params, chosen.ids, method="lookup"), chosen.codes, atol=1e-6)


def test_codes_are_revived_after_exactly_so_many_steps():
    params = {"codebook": jnp.arange(10.0).reshape(5, 2), "unused": jnp.array([0.0, 2.0, 1.0, 2.0, 2.0])}
    used = jnp.array([3, 0, 0, 0, 1])
    candidates = jnp.array([[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]])
    new = quantizer.revive(params, used, candidates, after=3)
    np.testing.assert_array_equal(new["codebook"], [[0, 1], [-1, -1], [4, 5], [-2, -2], [8, 9]])
    np.testing.assert_array_equal(new["unused"], [0, 0, 2, 0, 0])


def test_no_more_codes_are_revived_than_there_are_candidates():
    params = {"codebook": jnp.zeros((4, 1)), "unused": jnp.full(4, 9.0)}
    new = quantizer.revive(params, jnp.zeros(4, jnp.int32), jnp.ones((2, 1)), after=3)
    np.testing.assert_array_equal(new["codebook"][:, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(new["unused"], [0, 0, 10, 10])
