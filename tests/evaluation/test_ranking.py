"""The best of several pictures is the one of which most statements hold."""

import numpy as np
import pytest

from muse_jax.data import scenes
from muse_jax.evaluation import ranking


def test_the_true_picture_wins():
    truths = scenes.scenes(range(6), split="test")
    others = scenes.scenes(range(100, 106), split="test")
    images, prompts = [], []
    for index, (truth, other) in enumerate(zip(truths, others, strict=True)):
        group = [scenes.render(other, 64)] * 3
        group[index % 3] = scenes.render(truth, 64)
        images += group
        prompts += [truth.caption] * 3
    assert ranking.best(images, prompts, 3) == [3 * i + i % 3 for i in range(6)]


def test_of_equals_the_first_wins():
    scene = scenes.scene(0)
    assert ranking.best([scenes.render(scene, 32)] * 4, [scene.caption] * 4, 2) == [0, 2]


def test_a_prompt_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="a cat on a mat.*--best_of"):
        ranking.best([np.zeros((32, 32, 3), np.uint8)] * 2, ["a cat on a mat"] * 2, 2)
