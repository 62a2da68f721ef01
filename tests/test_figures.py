"""The pictures that the quickstart leaves."""

import numpy as np
import pytest
from PIL import Image

from muse_jax import figures


def test_masked_tokens_are_covered_and_others_are_not():
    picture = np.full((8, 12, 3), (200, 0, 100), np.uint8)
    masked = np.zeros((2, 3), bool)
    masked[1, 2] = True
    covered = figures.cover_masked(picture, masked)
    assert covered.dtype == np.uint8
    changed = (covered != picture).any(-1)
    assert changed[4:, 8:].all()
    assert changed.sum() == 16


@pytest.mark.parametrize("count", [1, 3])
def test_sheets_are_written(tmp_path, count):
    low, high = (list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)) for side in (8, 16))
    figures.samples(tmp_path / "samples.png", ["a red circle"] * count, {"low": low, "high": high})
    figures.decoding(tmp_path / "decoding.png", "a red circle", {"base": low * 5, "superres": high})
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 5)] + [{"step": 5, "eval/loss": 0.3}]
    figures.curves(tmp_path / "curves.png", {"base": lines, "superres": []})
    for name in ("samples", "decoding", "curves"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10, f"{name}.png is empty"
