"""PSNR and SSIM against plain formulas and TensorFlow's; codebook usage; what is read on reconstructions."""

import numpy as np
import pytest

from muse_jax.data import scenes
from muse_jax.evaluation import reconstruction


def _pairs(size=32):
    originals = scenes.render_batch(scenes.scenes(range(6)), size)
    noise = np.random.default_rng(0).normal(0, np.array([2, 5, 10, 20, 40, 80])[:, None, None, None], originals.shape)
    return originals, np.clip(originals + noise, 0, 255).astype(np.uint8)


def _plain_ssim(x, y):
    """Wang et al. 2004, window by window."""
    d = np.arange(11) - 5
    w = np.exp(-(d[:, None] ** 2 + d[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            for c in range(3):
                a, b = (p[i : i + 11, j : j + 11, c].astype(float) for p in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, ab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_is_the_papers():
    originals, spoilt = _pairs()
    expected = [_plain_ssim(a[:16, :20], b[:16, :20]) for a, b in zip(originals, spoilt, strict=True)]
    np.testing.assert_allclose(reconstruction.ssim(originals[:, :16, :20], spoilt[:, :16, :20]), expected, atol=1e-9)


def test_psnr_by_the_formula_and_its_ceiling():
    originals, spoilt = _pairs()
    expected = [
        20 * np.log10(255) - 10 * np.log10(((a.astype(float) - b) ** 2).mean())
        for a, b in zip(originals, spoilt, strict=True)
    ]
    np.testing.assert_allclose(reconstruction.psnr(originals, spoilt), expected, rtol=1e-5)
    assert (reconstruction.psnr(originals, originals) == 100).all()


@pytest.mark.slow
def test_both_are_as_tensorflow_has_them():
    tf = pytest.importorskip("tensorflow")
    originals, spoilt = _pairs(48)
    psnr, ssim = tf.image.psnr(originals, spoilt, 255).numpy(), tf.image.ssim(originals, spoilt, 255).numpy()
    np.testing.assert_allclose(reconstruction.psnr(originals, spoilt), psnr, rtol=1e-4)
    np.testing.assert_allclose(reconstruction.ssim(originals, spoilt), ssim, atol=1e-4)


def test_small_pictures_have_no_ssim():
    with pytest.raises(ValueError, match=r"11 x 11 pixels; got \[8, 8\]"):
        reconstruction.ssim(*[np.zeros((1, 8, 8, 3), np.uint8)] * 2)


def test_codebook_usage():
    usage = reconstruction.codebook_usage(np.array([[[0, 1], [1, 0]], [[3, 3], [3, 3]]]), 8)
    assert usage["codes"] == 3
    assert usage["codebook_size"] == 8
    assert usage["codebook_used"] == 3 / 8
    np.testing.assert_allclose(usage["token_entropy"], 1.5 * np.log(2))
    assert reconstruction.codebook_usage(np.zeros((2, 4), int), 8)["token_entropy"] == 0
    for tokens in (np.array([[8]]), np.array([[-1]])):
        with pytest.raises(ValueError, match="0..7"):
            reconstruction.codebook_usage(tokens, 8)


def test_measure_with_and_without_captions():
    items = scenes.scenes(range(20), split="test")
    originals = scenes.render_batch(items, 32)
    tokens = np.arange(20)[:, None]
    figures = reconstruction.measure(originals, originals, tokens, 20, [item.caption for item in items])
    assert figures["count"] == 20
    assert (figures["psnr"], figures["ssim"], figures["codebook_used"]) == (100, 1, 1)
    assert (figures["statements"], figures["all_statements"]) == (1, 1)
    spoilt = reconstruction.measure(originals, np.roll(originals, 1, 0), tokens, 20, [item.caption for item in items])
    assert spoilt["psnr"] < 25
    assert spoilt["ssim"] < 0.9
    assert spoilt["statements"] < 0.6
    assert "statements" not in reconstruction.measure(originals, originals, tokens, 20)
