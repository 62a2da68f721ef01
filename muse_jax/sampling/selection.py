"""Selection rules: which places are masked again after a step has drawn a token for every place.

A rule is a function of (key, drawn, step: `sampler.Step`) and returns True where a place goes back to the mask. The
loop in `sampler` calls it with one example's arrays (it maps over the batch) and never lets it
touch a known place.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Drawn(NamedTuple):
    """What a step proposes for one example."""

    tokens: Int[Array, " n"]  # every place filled
    # Of each token under the (guided) logits that it was drawn from, now or before; no temperature, no filters.
    log_prob: Float[Array, " n"]
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
    return lowest(jnp.where(drawn.fresh, _confidence(key, drawn, step), jnp.inf), step.still_masked)


def _confidence(key: jax.Array, drawn: Drawn, step: Any) -> Float[Array, " n"]:
    return drawn.log_prob + step.choice_temperature * jax.random.gumbel(key, drawn.log_prob.shape)


def anywhere(key: jax.Array, drawn: Drawn, step: Any) -> Bool[Array, " n"]:
    """Masks places at random, settled or not, among those that may change (Muse section 3.3.2; Paella's renoising)."""
    chance = jax.random.uniform(key, drawn.log_prob.shape)
    return lowest(jnp.where(drawn.known, jnp.inf, chance), step.still_masked)


def revocable(key: jax.Array, drawn: Drawn, step: Any) -> Bool[Array, " n"]:
    """The least sure of all tokens are masked again, those settled before among them.

    A relative of Token-Critic (Lezama et al. 2022, arXiv 2209.04439, algorithm 2) that needs no second
    network. Differs from the paper: what judges a token is not a critic that sees the whole picture,
    but how likely the model itself found it when it drew it, with the noise of `most_confident`.
    """
    return lowest(jnp.where(drawn.known, jnp.inf, _confidence(key, drawn, step)), step.still_masked)


def remask(key: jax.Array, drawn: Drawn, step: Any) -> Bool[Array, " n"]:
    """Some settled tokens, at random, are masked again; so many more of the fresh ones stay.

    ReMDM (Wang et al. 2025, arXiv 2503.00307, section 4): what was drawn early, with little to see, gets
    another chance. `step.remasking` is its cap on the share of the settled tokens that go back, which is
    lower where fewer are to be masked than that. Differs from the paper: counts are the schedule's, not
    drawn, and which fresh tokens stay is decided as in `most_confident`.
    """
    key_fresh, key_settled = jax.random.split(key)
    settled = ~drawn.fresh & ~drawn.known
    # A hair more: 0.1 * 30 is to be 3 whatever it is in float32.
    share = jnp.floor(step.remasking * jnp.sum(settled) + 1e-4).astype(jnp.int32)
    back = jnp.minimum(share, step.still_masked)
    chance = jax.random.uniform(key_settled, drawn.log_prob.shape)
    revoked = lowest(jnp.where(settled, chance, jnp.inf), back)
    confidence = jnp.where(drawn.fresh, _confidence(key_fresh, drawn, step), jnp.inf)
    return revoked | lowest(confidence, step.still_masked - back)


def halton_order(rows: int, columns: int) -> Int[np.ndarray, " n"]:
    """The places of a grid in the order in which the Halton sequence of bases 2 and 3 first meets them.

    >>> halton_order(2, 3).tolist()
    [4, 2, 3, 1, 5, 0]
    """
    order: dict[int, None] = {}
    index = 0
    while len(order) < rows * columns:
        index += 1
        order.setdefault(int(_radical_inverse(index, 2) * rows) * columns + int(_radical_inverse(index, 3) * columns))
    return np.array(list(order))


def _radical_inverse(index: int, base: int) -> float:
    """The digits of the index, mirrored at the point: number `index` of van der Corput's sequence."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator / denominator


@functools.lru_cache
def halton(rows: int, columns: int) -> Callable[[jax.Array, Drawn, Any], Bool[Array, " n"]]:
    """The rule that keeps tokens in the order of `halton_order`, whatever the model thinks of them.

    The Halton scheduler (Besnier et al. 2025, arXiv 2503.17076, section 3): places that are drawn in one
    step are far apart, so that what is drawn of one says little of another. The paper's schedule with it
    is "arccos". Differs from the paper: the order starts at the same place in every picture.
    """
    rank = np.argsort(halton_order(rows, columns))

    def rule(key: jax.Array, drawn: Drawn, step: Any) -> Bool[Array, " n"]:
        return lowest(jnp.where(drawn.fresh, -jnp.asarray(rank, jnp.float32), jnp.inf), step.still_masked)

    return rule


# A setting's names, and what makes the rule for a grid of rows and columns; the same function each time.
RULES: Mapping[str, Callable[[int, int], Callable]] = {
    "most_confident": lambda rows, columns: most_confident,
    "anywhere": lambda rows, columns: anywhere,
    "halton": halton,
    "remask": lambda rows, columns: remask,
    "revocable": lambda rows, columns: revocable,
}
