"""What is done to tokens and text before a model is asked to mend them.

Everything is for one example and its own key; `jax.vmap` over examples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def example_keys(key: jax.Array, example_ids: Int[Array, "b"]) -> jax.Array:
    """One key an example, from its id alone: the same on any mesh and in any batch order."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_ids)


def mask_ratio(
    key: jax.Array, schedule: Callable[[jax.Array, int], jax.Array], tokens: int, minimum: float = 0.0
) -> Float[Array, ""]:
    """r = schedule(u) with u uniform in [0, 1); at least `minimum`.

    With the cosine it has Muse's density (2 / pi) (1 - r^2)^(-1/2), of mean 0.64 (section 2.6).
    """
    return jnp.maximum(schedule(jax.random.uniform(key), tokens), minimum)


def random_mask(key: jax.Array, ratio: Float[Array, ""] | float, tokens: int) -> Bool[Array, "n"]:
    """True at ceil(ratio * tokens) places chosen at random, at least one.

    >>> int(random_mask(jax.random.key(0), 0.5, 9).sum())
    5
    """
    count = jnp.clip(jnp.ceil(ratio * tokens), 1, tokens)
    order = jnp.argsort(jax.random.uniform(key, (tokens,)))
    return jnp.zeros(tokens, bool).at[order].set(jnp.arange(tokens) < count)


def replace_some(key: jax.Array, tokens: Int[Array, "n"], highest: float, codebook_size: int) -> Int[Array, "n"]:
    """Replaces a share of the tokens, uniform in [0, highest], by random ones.

    What the super-resolution model then meets in sampling, the base model's mistakes, is no news to it.
    """
    key_share, key_place, key_token = jax.random.split(key, 3)
    share = jax.random.uniform(key_share) * highest
    random = jax.random.randint(key_token, tokens.shape, 0, codebook_size, tokens.dtype)
    return jnp.where(jax.random.uniform(key_place, tokens.shape) < share, random, tokens)


def noised(key: jax.Array, tokens: Int[Array, "n"], mask: Bool[Array, "n"], codebook_size: int) -> Int[Array, "n"]:
    """Random codes in the mask's places: noise instead of a mask id (Paella, arXiv 2211.07292, section 3).

    >>> noised(jax.random.key(0), jnp.array([1, 2]), jnp.array([False, False]), 8).tolist()
    [1, 2]
    """
    return jnp.where(mask, jax.random.randint(key, tokens.shape, 0, codebook_size, tokens.dtype), tokens)


def drop_text(key: jax.Array, text_mask: Bool[Array, "t"], share: float) -> Bool[Array, "t"]:
    """Hides the whole text with probability `share`: the unconditional half of guidance (Muse 2.7)."""
    return text_mask & (jax.random.uniform(key) >= share)
