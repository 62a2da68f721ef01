"""Losses and the metrics that make them readable."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from muse_jax.tasks.task import Mean


def cross_entropy(logits: Float[Array, "*b v"], labels: Int[Array, "*b"], smoothing: float = 0.0) -> Float[Array, "*b"]:
    """-sum_k q_k log p_k, where q is (1 - smoothing) on the label and smoothing / v on every code.

    >>> float(cross_entropy(jnp.zeros(8), jnp.array(3)).round(4))
    2.0794
    """
    # A masked sum instead of an index: its gradient is no scatter, and it fuses with the rest.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0), axis=-1)
    target = (1 - smoothing) * chosen + smoothing * jnp.mean(logits, axis=-1) if smoothing else chosen
    return jax.nn.logsumexp(logits, axis=-1) - target


def weighted_example_mean(values: Float[Array, "b n"], weights: Float[Array, "b n"]) -> Float[Array, "b"]:
    """Each example's mean over its places, weighted; 0 where nothing is weighted."""
    return jnp.sum(values * weights, axis=-1) / jnp.maximum(jnp.sum(weights, axis=-1), 1e-9)


def by_ratio(
    name: str, values: Float[Array, "b"], ratios: Float[Array, "b"], edges: Sequence[float] = (0.25, 0.5, 0.75)
) -> dict[str, Mean]:
    """A metric split into buckets of mask ratio: {"name/ratio_0.25_0.50": ...}."""
    bounds = (0.0, *edges, 1.0)
    metrics = {}
    for low, high in zip(bounds, bounds[1:], strict=False):
        inside = (ratios > low) & (ratios <= high)
        metrics[f"{name}/ratio_{low:.2f}_{high:.2f}"] = Mean.of(values, inside.astype(jnp.float32))
    return metrics


def entropy_of_counts(counts: Float[Array, "k"]) -> Float[Array, ""]:
    """Entropy in nats of the frequencies: what a predictor that knows them alone reaches.

    >>> float(entropy_of_counts(jnp.array([1.0, 1.0, 0.0])).round(4))
    0.6931
    """
    p = counts / jnp.maximum(jnp.sum(counts), 1)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))


def hinge_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Hinge loss of the discriminator (Lim & Ye 2017), as in VQGAN."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """The generator's: -mean D(fake)."""
    return -jnp.mean(fake)


def adaptive_weight(reconstruction: Any, adversarial: Any) -> Float[Array, ""]:
    """lambda = |grad L_rec| / (|grad L_gan| + 1e-4), at most 1e4 (Esser et al. 2021, equation 7).

    Args:
      reconstruction, adversarial: gradients of the two losses by the decoder's last layer (any pytree).
    """

    def norm(tree: Any) -> Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))

    weight = norm(reconstruction) / (norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, 1e4))


def accuracy(logits: Float[Array, "*b v"], labels: Int[Array, "*b"]) -> Bool[Array, "*b"]:
    """Whether the label has the highest logit."""
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0), axis=-1)
    return chosen >= jnp.max(logits, axis=-1)
