"""Selection rules: which places are masked again after a step has drawn a token for every place.

A rule is a function of (key, drawn, step: `sampler.Step`) and returns True where a place goes back to the mask. The
loop in `sampler` calls it with one example's arrays (it maps over the batch) and never lets it
touch a known place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Drawn(NamedTuple):
    """What a step proposes for one example."""

    tokens: Int[Array, " n"]  # every place filled
    log_prob: Float[Array, " n"]  # of the drawn token under the (guided) logits, without temperature or filters
    fresh: Bool[Array, " n"]  # drawn in this step; the other places were settled before it
    known: Bool[Array, " n"]  # never to change, whatever the rule says


def lowest(values: Float[Array, " n"], count: Int[Array, ""]) -> Bool[Array, " n"]:
    """True at exactly `count` places, those with the lowest values; of equals the first ones.

    By ranks, where a threshold would take all equals or none.

    >>> lowest(jnp.array([2.0, 1.0, 1.0, 1.0]), jnp.int32(2)).tolist()
    [False, True, True, False]
    """
    order = jnp.argsort(values, stable=True)
    return jnp.zeros(values.shape, bool).at[order].set(jnp.arange(values.size) < count)


def most_confident(key: jax.Array, drawn: Drawn, step: Any) -> Bool[Array, " n"]:
    """Keeps the tokens that the model is surest of (MaskGIT section 3.2, Muse section 2.8).

    Confidence is log p of the drawn token plus Gumbel noise times the step's choice temperature,
    which the plan anneals to 0 (MaskGIT's code; its paper leaves the noise out). Settled tokens
    are infinitely confident, so they stay.
    """
    noise = step.choice_temperature * jax.random.gumbel(key, drawn.log_prob.shape)
    return lowest(jnp.where(drawn.fresh, drawn.log_prob + noise, jnp.inf), step.still_masked)


def anywhere(key: jax.Array, drawn: Drawn, step: Any) -> Bool[Array, " n"]:
    """Masks places at random, settled or not, among those that may change (Muse section 3.3.2)."""
    chance = jax.random.uniform(key, drawn.log_prob.shape)
    return lowest(jnp.where(drawn.known, jnp.inf, chance), step.still_masked)
