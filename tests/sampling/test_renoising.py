"""Paella's sampler without a model: typical codes against plain NumPy, and what goes back to the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.sampling import sampler, schedules

N, CODES, LIKED = 16, 8, 3


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.6, 1.0])
def test_typical_codes_are_those_of_the_definition(mass):
    p = np.random.default_rng(0).dirichlet([0.4] * 12, 50).astype(np.float32)
    found = np.asarray(sampler.typical(jnp.asarray(p), mass))
    for row, kept in zip(p.astype(np.float64), found, strict=True):
        surprise = -np.log(row)
        order = np.argsort(np.abs(surprise - (row * surprise).sum()))
        before = np.cumsum(row[order]) - row[order]
        clear = np.abs(before - mass) > 1e-5  # float32 may decide otherwise at the border
        np.testing.assert_array_equal(kept[order][clear], (before < mass)[clear])


def decoded(plan, known=None, start=None):
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    start = sampler.noise(keys, N, CODES) if start is None else start
    liked = jnp.zeros((2, N, CODES)).at[..., LIKED].set(60.0)
    seen = []

    def predict(tokens, step):
        jax.debug.callback(lambda t: seen.append(float(t)), step.t)
        return liked

    run = jax.jit(lambda: sampler.decode(predict, start, plan, keys, start, known=known, revisable=True, history=True))
    tokens, history = jax.device_get(run())
    jax.effects_barrier()
    return np.asarray(start), tokens, history, seen


def test_places_go_back_to_the_first_noise_as_many_as_the_schedule_says():
    plan = sampler.make_plan(tokens=N, num_inference_steps=5, selection_rule="anywhere")
    known = jnp.zeros((2, N), bool).at[:, :4].set(True)
    start, tokens, history, seen = decoded(plan, known)
    np.testing.assert_array_equal(tokens, np.where(known, start, LIKED))
    np.testing.assert_array_equal(
        history.masked.sum(-1), np.repeat(schedules.counts("cosine", 5, N - 4)[:, None], 2, 1)
    )
    np.testing.assert_array_equal(history.tokens, np.where(history.masked | known, start, LIKED))
    assert (history.masked[1:] & ~history.masked[:-1]).any(), "a place that was kept may go back"
    np.testing.assert_allclose(sorted(set(seen)), np.arange(5) / 5, atol=1e-6)


def test_decoding_may_start_late():
    plan = sampler.make_plan(tokens=N, num_inference_steps=4, selection_rule="anywhere", start_time=0.5)
    t = 0.5 + 0.5 * np.arange(5) / 4
    np.testing.assert_allclose(plan.t, t[:-1], rtol=1e-6)
    share = np.cos(np.pi / 2 * t) / np.cos(np.pi / 4)
    np.testing.assert_array_equal(plan.still_masked[:, N], np.floor(N * share[1:] + 1e-9))


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_the_time_of_a_share_is_the_schedules_inverse(schedule):
    shares = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(schedules.masked_share(schedule, schedules.time(schedule, shares)), shares, atol=1e-3)
