"""The newer samplers in the decode loop: against plain NumPy step by step, and what all rules promise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.sampling import guidance, sampler, schedules, selection

ROWS, COLUMNS, CODES = 3, 4, 7
N = ROWS * COLUMNS
TABLE = np.random.default_rng(0).normal(size=(CODES + 1, CODES)).astype(np.float32) * 2
SHARES = {"remask": 0.4}
RULES = sorted(selection.RULES)


@jax.jit
def run(tokens, seeds, plan):
    table = jnp.asarray(TABLE)
    predict = guidance.unguided(lambda tokens: table[tokens] + table[jnp.roll(tokens, 1, axis=-1)] * 0.5)
    return sampler.decode(predict, tokens, plan, jax.vmap(jax.random.key)(seeds), CODES, history=True)


def make_plan(rule, steps=6, **settings):
    shared = {"tokens": N, "grid": (ROWS, COLUMNS), "num_inference_steps": steps}
    return sampler.make_plan(**shared, selection_rule=rule, remasking=SHARES.get(rule, 0.0), **settings)


def start(known):
    """Tokens of which `known[i]` are given, at random places."""
    rng = np.random.default_rng(1)
    tokens = np.full((len(known), N), CODES, np.int32)
    for row, count in zip(tokens, known, strict=True):
        row[rng.permutation(N)[:count]] = rng.integers(CODES, size=count)
    return tokens


def lowest(values, count):
    chosen = np.zeros(N, bool)
    chosen[np.argsort(values, kind="stable")[:count]] = True
    return chosen


def halton_places():
    """The places in the order of the sequence, by its definition: digits mirrored at the point."""
    order = []
    for i in range(1, 10_000):
        point = []
        for base in (2, 3):
            value, digits, scale = i, 0.0, 1.0
            while value:
                scale /= base
                digits += scale * (value % base)
                value //= base
            point.append(digits)
        place = int(point[0] * ROWS + 1e-9) * COLUMNS + int(point[1] * COLUMNS + 1e-9)
        if place not in order:
            order.append(place)
    return order


def again(rule, key, confidence_of, fresh, known, count, temperature):
    """Which places a rule masks again, in NumPy; only the random numbers come from JAX."""

    def noisy(key):
        return confidence_of + temperature * np.asarray(jax.random.gumbel(key, (N,)))

    if rule == "halton":
        latest_first = [place for place in halton_places()[::-1] if fresh[place]][:count]
        return np.isin(np.arange(N), latest_first)
    if rule == "anywhere":
        return lowest(np.where(known, np.inf, np.asarray(jax.random.uniform(key, (N,)))), count)
    if rule == "revocable":
        return lowest(np.where(known, np.inf, noisy(key)), count)
    if rule == "remask":
        key_fresh, key_settled = jax.random.split(key)
        settled = ~fresh & ~known
        back = min(int(0.4 * settled.sum() + 1e-4), count)
        chance = np.asarray(jax.random.uniform(key_settled, (N,)))
        revoked = lowest(np.where(settled, chance, np.inf), back)
        return revoked | lowest(np.where(fresh, noisy(key_fresh), np.inf), count - back)
    return lowest(np.where(fresh, noisy(key), np.inf), count)


def reference(rule, tokens, seed, steps):
    tokens, known = tokens.copy(), tokens != CODES
    masked, log_prob, trail = ~known, np.zeros(N, np.float32), []
    counts = schedules.counts("cosine", steps, int(masked.sum()))
    for i in range(steps):
        key_token, key_choice = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        logits = TABLE[tokens] + TABLE[np.roll(tokens, 1)] * np.float32(0.5)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        proposal = np.argmax(logits + np.asarray(jax.random.gumbel(key_token, logits.shape)), -1)
        fresh = masked
        tokens = np.where(fresh, proposal, tokens)
        log_prob = np.where(fresh, log_p[np.arange(N), proposal], log_prob)
        masked = again(rule, key_choice, log_prob, fresh, known, counts[i], 4.5 * (1 - (i + 1) / steps)) & ~known
        tokens = np.where(masked, CODES, tokens)
        trail.append(tokens)
    return np.stack(trail)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_matches_numpy_step_by_step_and_keeps_its_promises(rule):
    known = np.array([0, 3, 9, 12])
    tokens, seeds = start(known), np.arange(4, dtype=np.uint32)
    out, history = run(tokens, seeds, make_plan(rule))
    for i in range(4):
        np.testing.assert_array_equal(history.tokens[:, i], reference(rule, tokens[i], i, 6))
    np.testing.assert_array_equal(history.masked.sum(-1), schedules.counts("cosine", 6, N - known))
    given = tokens != CODES
    assert all(np.array_equal(step[given], tokens[given]) for step in np.asarray(history.tokens))
    assert np.asarray(out).max() < CODES, "nothing is masked after the last step"
    # Only those that may take back what was settled do so, and they do.
    settled = ~np.asarray(history.masked)[:-1]
    taken_back = (np.asarray(history.masked)[1:] & settled).any()
    assert taken_back == (rule in ("anywhere", "remask", "revocable"))


def test_another_share_of_remasking_compiles_nothing_and_another_rule_does():
    tokens, seeds = start([0, 1, 2, 3]), np.arange(4, dtype=np.uint32)
    run(tokens, seeds, make_plan("remask"))
    compiled = run._cache_size()
    plan = sampler.make_plan(
        tokens=N, grid=(ROWS, COLUMNS), num_inference_steps=6, selection_rule="remask", remasking=0.9,
        guidance_scale=5.0, guidance_ramp="power_cosine", guidance_power=3.0, guidance_start=0.2, guidance_end=0.7,
    )  # fmt: skip
    run(tokens, seeds + 1, plan)
    assert run._cache_size() == compiled
    run(tokens, seeds, make_plan("halton"))
    run(tokens, seeds, make_plan("halton"))  # the same function, however often the plan is made
    assert run._cache_size() <= compiled + 1


@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (8, 8), (16, 16), (5, 12)])
def test_halton_meets_every_place_once_and_spreads(sides):
    order = selection.halton_order(*sides)
    assert sorted(order.tolist()) == list(range(sides[0] * sides[1]))
    if min(sides) >= 8:
        rows, columns = np.divmod(order[: len(order) // 4], sides[1])
        quarters = np.bincount(2 * (rows >= sides[0] // 2) + (columns >= sides[1] // 2), minlength=4)
        assert np.ptp(quarters) <= 2, "a quarter of the places lies evenly in the picture"


def test_guidance_in_an_interval():
    scales = guidance.scales("constant", 5, np.array([3.0, 5.0]), interval=(0.25, 0.75))
    np.testing.assert_allclose(scales, np.array([[1, 1], [3, 5], [3, 5], [3, 5], [1, 1]]))
    np.testing.assert_array_equal(guidance.scales("constant", 1, 3.0, interval=(0.2, 0.4)), [3.0])


def test_power_cosine_guidance():
    t = np.linspace(0, 1, 9)
    for power in (0.5, 1.0, 3.0):
        expected = 1 + 4 * 0.5 * (1 - np.cos(np.pi * t**power))
        np.testing.assert_allclose(guidance.scales("power_cosine", 9, 5.0, power), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_rule": "halten"}, "selection_rule is 'halten'; expected one of .*'halton'"),
        ({"remasking": 1.5}, "remasking is 1.5"),
        ({"guidance_start": 0.5, "guidance_end": 0.2}, "guidance_start is 0.5 and guidance_end 0.2"),
        ({"guidance_power": -1.0}, "guidance_power is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler.make_plan(tokens=4, num_inference_steps=2, **settings)


def test_rules_are_for_one_grid():
    assert selection.halton(3, 4) is selection.halton(3, 4)
    assert partial(selection.RULES["halton"], 3, 4)() is not selection.halton(4, 3)
