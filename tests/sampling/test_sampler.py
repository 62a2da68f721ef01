"""The decode loop, without any network: against NumPy step by step, and its promises on any batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.sampling import guidance, sampler, schedules

N, CODES = 12, 7  # places of an example, codes; the mask id is CODES
TABLE = np.random.default_rng(0).normal(size=(3, CODES + 1, CODES)).astype(np.float32) * 2


def toy(branch=0):
    """A predictor whose logits at a place depend on the tokens there and beside it."""
    table = jnp.asarray(TABLE)

    def predict(tokens):
        return table[branch, tokens] + table[branch, jnp.roll(tokens, 1, axis=-1)] * 0.5

    return predict


def toy_numpy(tokens, branch=0):
    return TABLE[branch, tokens] + TABLE[branch, np.roll(tokens, 1, axis=-1)] * np.float32(0.5)


def both(doubled):
    conditional, unconditional = jnp.split(doubled, 2)
    return jnp.concatenate([toy(0)(conditional), toy(1)(unconditional)])


@partial(jax.jit, static_argnames=("guided", "revisable"))
def run(tokens, seeds, plan, guided=False, revisable=False):
    predict = guidance.guided(both) if guided else guidance.unguided(toy())
    keys = jax.vmap(jax.random.key)(seeds)
    return sampler.decode(predict, tokens, plan, keys, CODES, revisable=revisable, history=True)


def start(rng, batch, known):
    """Tokens of which `known[i]` are given, at random places."""
    tokens = np.full((batch, N), CODES, np.int32)
    for row, count in zip(tokens, known, strict=True):
        places = rng.permutation(N)[:count]
        row[places] = rng.integers(CODES, size=count)
    return tokens


def reference(tokens, seed, *, steps, schedule, temperature, choice, scale=None):
    """MaskGIT's loop for one example in plain NumPy; only the noise comes from JAX."""
    tokens, masked = tokens.copy(), tokens == CODES
    n0, trail = masked.sum(), []
    for i in range(steps):
        key_token, key_choice = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        logits = toy_numpy(tokens)
        if scale is not None:
            unconditional = toy_numpy(tokens, 1)
            s = 1 + (scale - 1) * (i / (steps - 1) if steps > 1 else 1)
            logits = unconditional + s * (logits - unconditional)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        noise = np.asarray(jax.random.gumbel(key_token, logits.shape))
        proposal = np.where(masked, np.argmax(logits + temperature * noise, -1), tokens)
        confidence = log_p[np.arange(N), proposal.clip(0, CODES - 1)]
        confidence = confidence + choice * (1 - (i + 1) / steps) * np.asarray(jax.random.gumbel(key_choice, (N,)))
        confidence[~masked] = np.inf
        if i == steps - 1:
            again = 0
        else:
            share = schedules.masked_share(schedule, (i + 1) / steps, float(n0))
            again = min(max(1, min(masked.sum() - 1, int(np.floor(n0 * share + 1e-9)))), n0)
        masked = np.zeros(N, bool)
        masked[np.argsort(confidence, kind="stable")[:again]] = True
        tokens = np.where(masked, CODES, proposal)
        trail.append(tokens)
    return np.stack(trail)


@pytest.mark.parametrize(
    ("schedule", "steps", "temperature", "choice", "scale"),
    [
        ("cosine", 6, 1.0, 4.5, None),
        ("linear", 6, 0.7, 1.0, None),
        ("sqrt", 6, 0.0, 0.0, 4.0),  # no noise at all
        ("square", 6, 1.0, 4.5, 2.0),
        ("cosine", 20, 1.0, 4.5, 3.0),  # more steps than tokens
        ("cosine", 1, 1.0, 4.5, 3.0),
    ],
)
def test_matches_numpy_step_by_step(schedule, steps, temperature, choice, scale):
    rng = np.random.default_rng(steps)
    tokens, seeds = start(rng, 5, [0, 3, 9, 12, 5]), np.arange(5, dtype=np.uint32)
    plan = sampler.make_plan(
        tokens=N,
        num_inference_steps=steps,
        schedule=schedule,
        token_temperature=temperature,
        choice_temperature=choice,
        guidance_scale=1.0 if scale is None else scale,
    )
    out, history = run(tokens, seeds, plan, guided=scale is not None)
    for i in range(5):
        expected = reference(
            tokens[i], i, steps=steps, schedule=schedule, temperature=temperature, choice=choice, scale=scale
        )
        np.testing.assert_array_equal(history.tokens[:, i], expected)
        np.testing.assert_array_equal(out[i], expected[-1])


@pytest.mark.parametrize("revisable", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_promises_on_any_batch(batch, revisable):
    """Known tokens never change; each step leaves exactly the schedule's number masked; none at the end."""
    rng = np.random.default_rng(batch)
    for trial, schedule in enumerate(("cosine", "linear", "log", "exponential", "circle", "cubic")):
        known = rng.integers(0, N + 1, size=batch)
        tokens = start(rng, batch, known)
        plan = sampler.make_plan(tokens=N, num_inference_steps=6, schedule=schedule)
        out, history = run(tokens, rng.integers(1 << 31, size=batch).astype(np.uint32), plan, revisable=revisable)
        given = tokens != CODES
        for step in np.asarray(history.tokens):
            np.testing.assert_array_equal(step[given], tokens[given])
        np.testing.assert_array_equal(history.masked, history.tokens == CODES)
        np.testing.assert_array_equal(history.masked.sum(-1), schedules.counts(schedule, 6, N - known))
        np.testing.assert_array_equal(out, history.tokens[-1])
        assert np.all((np.asarray(out) >= 0) & (np.asarray(out) < CODES)), trial
        if not revisable:  # what is settled stays
            settled = ~np.asarray(history.masked)[:-1]
            later = np.asarray(history.tokens)
            np.testing.assert_array_equal(later[1:][settled], later[:-1][settled])


def test_an_example_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    tokens, seeds = start(rng, 5, [0, 2, 5, 11, 0]), np.array([5, 6, 7, 8, 5], np.uint32)
    plan = sampler.make_plan(tokens=N, num_inference_steps=6)
    together, _ = run(tokens, seeds, plan)
    for i in range(5):
        alone, _ = run(tokens[i : i + 1], seeds[i : i + 1], plan)
        np.testing.assert_array_equal(alone[0], together[i])
    np.testing.assert_array_equal(together[0], together[4])  # same seed, same start
    other, _ = run(tokens, seeds + 100, plan)
    assert not np.array_equal(together, other)


def test_settings_may_differ_in_a_batch():
    """[b] numbers give each example what it would have got alone with its own number."""
    rng = np.random.default_rng(0)
    tokens, seeds = start(rng, 5, [0] * 5), np.arange(5, dtype=np.uint32)
    values = np.array([1.0, 1.5, 2.0, 4.0, 8.0])
    names = {"guidance_scale": values, "token_temperature": values / 4, "choice_temperature": values}
    plan = sampler.make_plan(tokens=N, num_inference_steps=6, **names)
    together, _ = run(tokens, seeds, plan, guided=True)
    for i in (0, 3, 4):
        own = sampler.make_plan(tokens=N, num_inference_steps=6, **{k: v[i] for k, v in names.items()})
        np.testing.assert_array_equal(run(tokens, seeds, own, guided=True)[0][i], together[i])


def test_other_values_do_not_compile_again():
    tokens, seeds = start(np.random.default_rng(0), 5, [1, 2, 3, 4, 5]), np.arange(5, dtype=np.uint32)

    def once(**settings):
        return run(tokens, seeds, sampler.make_plan(tokens=N, num_inference_steps=6, **settings), guided=True)

    once()
    compiled = run._cache_size()
    once(guidance_scale=7.0, schedule="linear", guidance_ramp="constant", token_temperature=0.5, choice_temperature=0.0)
    assert run._cache_size() == compiled
    once(top_k=3)
    assert run._cache_size() == compiled + 1  # the count can rise


def test_known_places_can_be_named():
    """Editing: all tokens are there, some are drawn anew, and those that are known stay even if they look masked."""
    tokens = jnp.full((1, N), CODES)
    known = jnp.arange(N)[None] < 4
    plan = sampler.make_plan(tokens=N, num_inference_steps=3)
    decode = jax.jit(partial(sampler.decode, guidance.unguided(toy()), mask_id=CODES))
    out, _ = decode(tokens, plan, jax.random.key(0)[None], known=known)
    assert np.array_equal(out[0] == CODES, known[0])


def test_no_rule_can_touch_a_known_place():
    """Whatever a selection rule says: this one wants everything masked again."""
    tokens = jnp.asarray(start(np.random.default_rng(0), 1, [5]))
    plan = sampler.make_plan(tokens=N, num_inference_steps=3)
    greedy = partial(sampler.decode, guidance.unguided(toy()), mask_id=CODES, history=True)
    decode = jax.jit(partial(greedy, select=lambda key, drawn, step: jnp.ones(N, bool)))
    _, history = decode(tokens, plan, jax.random.key(0)[None])
    np.testing.assert_array_equal(history.tokens, jnp.broadcast_to(tokens, (3, 1, N)))


def test_masked_places_may_hold_anything():
    """`mask_id` as an array and `revisable`: renoising samplers put places back to their own noise."""
    noise = jnp.asarray(np.random.default_rng(0).integers(CODES, size=(2, N)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    plan = sampler.make_plan(tokens=N, num_inference_steps=4)
    known = jnp.zeros((2, N), bool)
    decode = jax.jit(partial(sampler.decode, guidance.unguided(toy()), revisable=True, history=True))
    out, history = decode(noise, plan, keys, noise, known=known)
    for tokens, masked in zip(history.tokens, history.masked, strict=True):
        np.testing.assert_array_equal(tokens[masked], noise[masked])
    assert not np.any(history.masked[-1])
    assert out.shape == (2, N)


# ------------------------------------------------------------------------------------------ draw


LOGITS = jnp.array([1.0, 3.0, 3.0, -1.0, 2.0, 0.0])
KEYS = jax.random.split(jax.random.key(1), 6000)


@partial(jax.jit, static_argnames="top_k")
def draws(temperature, top_p, top_k):
    return jax.vmap(lambda key: sampler.draw(key, LOGITS[None], temperature, top_k=top_k, top_p=top_p))(KEYS)


def frequencies(temperature=1.0, top_k=0, top_p=None):
    tokens, log_prob = draws(temperature, top_p, top_k)
    np.testing.assert_allclose(log_prob[:, 0], jax.nn.log_softmax(LOGITS)[tokens[:, 0]], rtol=1e-5)
    return np.bincount(np.asarray(tokens[:, 0]), minlength=6) / len(KEYS)


def softmax(x):
    p = np.exp(x - np.max(x))
    return p / p.sum()


def close(measured, p):
    assert np.all(np.abs(measured - p) <= 4 * np.sqrt(p * (1 - p) / len(KEYS)) + 1e-6), (measured, p)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_from_the_tempered_softmax(temperature):
    close(frequencies(temperature=temperature), softmax(np.asarray(LOGITS) / temperature))


def test_temperature_zero_takes_the_likeliest():
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}):
        assert frequencies(temperature=0.0, **settings)[1] == 1


def test_top_k_keeps_exactly_k():
    """Also where the k-th and the next are equal: the lower id stays."""
    close(frequencies(top_k=1), np.array([0, 1.0, 0, 0, 0, 0]))
    close(frequencies(top_k=3), softmax(np.where([0, 1, 1, 0, 1, 0], LOGITS, -np.inf)))
    close(frequencies(top_k=100), softmax(np.asarray(LOGITS)))


def test_top_p_keeps_the_nucleus():
    p = softmax(np.asarray(LOGITS))  # 0.05, 0.37, 0.37, 0.01, 0.14, 0.02
    close(frequencies(top_p=0.7), softmax(np.where([0, 1, 1, 0, 0, 0], LOGITS, -np.inf)))
    close(frequencies(top_p=0.8), softmax(np.where([0, 1, 1, 0, 1, 0], LOGITS, -np.inf)))
    close(frequencies(top_p=1.0), p)
    # After the temperature: a flatter softmax needs more codes for the same probability.
    flat = frequencies(top_p=0.8, temperature=4.0)
    assert np.count_nonzero(flat) > 3
    # After top-k: the probability is of what top-k left.
    close(frequencies(top_p=0.9, top_k=2), softmax(np.where([0, 1, 1, 0, 0, 0], LOGITS, -np.inf)))


def test_nucleus_matches_a_sort():
    rng = np.random.default_rng(0)
    p = softmax(rng.normal(size=200) * 3).astype(np.float32)
    order = np.argsort(-p)
    for top_p in (0.01, 0.3, 0.9, 0.999):
        before = np.cumsum(p[order].astype(np.float64)) - p[order]
        expected = np.zeros(200, bool)
        expected[order] = before < top_p
        np.testing.assert_array_equal(sampler.nucleus(jnp.asarray(p), top_p), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"token_temperature": -1.0}, "token_temperature is -1.0"),
        ({"choice_temperature": float("nan")}, "choice_temperature is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"schedule": "cos"}, "Unknown schedule 'cos'"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler.make_plan(**{"tokens": 4, "num_inference_steps": 2, **settings})
