"""Mask schedules against the papers' numbers and a plain NumPy rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.sampling import schedules

FORMULAS = {  # MaskGIT's appendix and code; a second writing of each, in plain Python
    "cosine": lambda t, n: math.cos(math.pi * t / 2),
    "linear": lambda t, n: 1 - t,
    "square": lambda t, n: 1 - t * t,
    "cubic": lambda t, n: 1 - t * t * t,
    "circle": lambda t, n: math.sqrt(1 - t * t),
    "arccos": lambda t, n: 2 * math.acos(t) / math.pi,
    "sqrt": lambda t, n: 1 - t**0.5,
    "log": lambda t, n: 1.0 if t <= 1 / n else -math.log(t) / math.log(n),
    "exponential": lambda t, n: 1 - n ** (t - 1),
}


def rule(schedule, steps, start):
    """MaskGIT's counts, one at a time."""
    now, result = start, []
    for step in range(1, steps + 1):
        if step == steps:
            now = 0
        else:
            target = math.floor(start * FORMULAS[schedule](step / steps, max(start, 2)) + 1e-9)
            now = min(max(min(target, now - 1), 1), start)
        result.append(now)
    return result


def test_formulas_cover_the_schedules():
    assert FORMULAS.keys() == schedules.SCHEDULES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_shares(name):
    t = np.linspace(0.01, 1, 34)
    expected = [FORMULAS[name](x, 100) for x in t]
    np.testing.assert_allclose(schedules.masked_share(name, t, 100.0), expected, atol=1e-12)
    traced = jax.jit(lambda t: schedules.masked_share(name, t, 100.0))(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(traced, expected, atol=2e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_shares_fall_from_one_to_zero(name):
    share = schedules.masked_share(name, np.linspace(0, 1, 101), 1e6)
    assert np.all(np.diff(share) <= 0)
    np.testing.assert_allclose(share[[0, -1]], [1, 0], atol=2e-6)


def test_concave_and_convex():
    """MaskGIT, section 3.3: concave schedules keep more masked at half time than the linear one, convex fewer."""
    half = {name: float(schedules.masked_share(name, 0.5, 256.0)) for name in FORMULAS}
    assert all(half[name] > 0.5 for name in ("cosine", "square", "cubic", "circle", "arccos", "exponential"))
    assert half["linear"] == 0.5
    assert all(half[name] < 0.5 for name in ("sqrt", "log"))


def test_papers_counts():
    """Muse's two decodes: 24 steps for 256 tokens and 8 steps for 4096."""
    kept = -np.diff(schedules.counts("cosine", 24, 256), prepend=256)
    expected = [1, 2, 2, 4, 5, 6, 7, 8, 9, 9, 11, 11, 13, 13, 13, 14, 15, 16, 15, 16, 17, 16, 17, 16]
    assert kept.tolist() == expected
    kept = -np.diff(schedules.counts("cosine", 8, 4096), prepend=4096)
    assert kept.tolist() == [79, 233, 379, 509, 621, 708, 768, 799]


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_follow_the_rule(name):
    starts = np.array([0, 1, 2, 3, 5, 8, 23, 24, 25, 64, 255, 256, 1000, 4096])
    for steps in (1, 2, 7, 8, 24, 40):
        counts = schedules.counts(name, steps, starts)
        assert counts.tolist() == np.array([rule(name, steps, n) for n in starts.tolist()]).T.tolist()


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_are_sound(name):
    """Never negative, never more than before; every step keeps a token while two are masked; none at the end."""
    starts = np.arange(300)
    for steps in (1, 3, 24, 400):
        counts = schedules.counts(name, steps, starts)
        before = np.concatenate([starts[None], counts[:-1]])
        assert counts.min() == 0
        assert np.all(counts <= before)
        assert np.all((counts < before) | (before <= 1))
        assert np.all(counts[-1] == 0)
        assert np.all(counts[:-1, 1:] >= 1)


def test_whole_numbers_are_not_floored_away():
    assert schedules.counts("linear", 24, 24).tolist() == list(range(23, -1, -1))
    assert schedules.counts("linear", 49, 49).tolist() == list(range(48, -1, -1))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        schedules.masked_share("cosin", 0.5)
    with pytest.raises(ValueError, match="0 decoding steps"):
        schedules.counts("cosine", 0, 4)
