"""The Fréchet distance: against the formula written out, and on pictures that are wrong in known ways."""

import dataclasses

import numpy as np
import pytest
from scipy import linalg, ndimage

from muse_jax.data import scenes
from muse_jax.evaluation import frechet

COUNT = 256


def test_the_formula_with_square_roots_of_matrices():
    rng = np.random.default_rng(0)
    made, true = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 1, rng.normal(size=(90, 5)) * [1, 2, 3, 4, 5]
    # Any coordinates in which the true ones' covariance is the identity will do.
    factor = np.linalg.cholesky(np.cov(true, rowvar=False))
    one, two = (np.linalg.solve(factor, x.T).T for x in (made, true))
    s1, s2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    expected = np.sum((one.mean(0) - two.mean(0)) ** 2) + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert frechet.distance(made, true) == pytest.approx(expected, rel=1e-6)


def test_scales_and_mixtures_of_features_change_nothing():
    rng = np.random.default_rng(1)
    made, true = rng.normal(size=(40, 4)) + 0.5, rng.normal(size=(90, 4))
    mix = rng.normal(size=(4, 4))
    assert frechet.distance(made @ mix + 7, true @ mix + 7) == pytest.approx(frechet.distance(made, true), rel=1e-6)


@pytest.mark.parametrize(("made", "true"), [(1, 90), (40, 4)])
def test_too_few_pictures_are_refused(made, true):
    with pytest.raises(ValueError, match=f"got {made} and {true}"):
        frechet.distance(np.zeros((made, 4)), np.zeros((true, 4)))


def _objects(**changes):
    items = scenes.single_objects(range(COUNT), split="test")
    changed = [dataclasses.replace(s, groups=(dataclasses.replace(s.groups[0], **changes),)) for s in items]
    return scenes.render_batch(changed, 32)


def test_wrong_pictures_are_further_away_than_true_ones():
    true = frechet.features(scenes.render_batch(scenes.single_objects(range(COUNT, 5 * COUNT), split="test"), 32))
    nothing_wrong = frechet.distance(frechet.features(_objects()), true)
    blurred = ndimage.gaussian_filter(_objects().astype(float), (0, 1, 1, 0)).astype(np.uint8)
    broken = _objects()
    rng = np.random.default_rng(0)
    for picture in broken:  # one token of 4 x 4 pixels
        row, column = rng.integers(0, 8, 2) * 4
        picture[row : row + 4, column : column + 4] = rng.integers(0, 256, 3)
    wrong = {"shapes": _objects(shape="square"), "colours": _objects(color="red"), "blur": blurred, "token": broken}
    for what, images in wrong.items():
        assert frechet.distance(frechet.features(images), true) > 1.5 * nothing_wrong, what


def test_features_are_fixed_and_pictures_of_any_size_have_them():
    images = _objects()[:2]
    assert frechet.features(images).shape == (2, 32)
    large = images.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(frechet.features(large), frechet.features(images), rtol=1e-6)
    # By hand, at one place and channel after the other.
    kernel, pixels = frechet._kernel(), images[0].astype(np.float32) / 127.5 - 1
    windows = [pixels[y : y + 5, x : x + 5] for y in range(0, 28, 2) for x in range(0, 28, 2)]
    expected = [np.mean([max(np.sum(w.transpose(2, 0, 1) * kernel[..., d]), 0) for w in windows]) for d in range(3)]
    np.testing.assert_allclose(frechet.features(images)[0, :3], expected, rtol=1e-4)
    assert kernel.sum() == pytest.approx(_KERNEL_SUM, rel=1e-5), "other weights: no figure can be compared any more"


_KERNEL_SUM = 9.11115
