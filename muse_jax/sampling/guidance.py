"""Classifier-free guidance (Muse section 2.7): logits = u + s (c - u), where s = 1 is off.

Muse writes (1 + t) c - t u; its t is s - 1. A negative prompt takes the unconditional branch's place.
Over the steps the scale follows a ramp, within an interval of them (Kynkäänniemi et al. 2024, arXiv
2404.07724; with masked tokens eMIGM, arXiv 2503.07197): guidance at the first steps costs variety, at
the last ones it does little.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Predict = Callable[..., Float[Array, "b n v"]]  # of tokens [b, n] and, if it is told, the time
GuidedPredict = Callable[[Int[Array, "b n"], Any], Float[Array, "b n v"]]  # also takes the sampler's `Step`


def constant_ramp(t: np.ndarray, power: float = 1.0) -> np.ndarray:
    """The whole scale at every step."""
    return np.ones_like(t)


def linear_ramp(t: np.ndarray, power: float = 1.0) -> np.ndarray:
    """From no guidance at the first step to the whole scale at the last (Muse section 2.7)."""
    return t


def power_cosine_ramp(t: np.ndarray, power: float = 2.0) -> np.ndarray:
    """(1 - cos(pi t^power)) / 2 (MDT, Gao et al. 2023, arXiv 2303.14389; MaskBit, arXiv 2409.16211)."""
    return (1 - np.cos(np.pi * t**power)) / 2


RAMPS: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "linear": linear_ramp,
    "constant": constant_ramp,
    "power_cosine": power_cosine_ramp,
}


def scales(
    ramp: str,
    steps: int,
    guidance_scale: float | np.ndarray,
    power: float = 2.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """The guidance scale at every step.

    Args:
      ramp: a name in `RAMPS`: the share of (guidance_scale - 1) that is reached at time t in [0, 1].
      steps: decoding steps; a single one has the whole scale.
      guidance_scale: s, one number or one an example [b].
      power: of "power_cosine": the higher, the later guidance sets in.
      interval: times between which there is guidance, both included.

    Returns:
      float32 [steps] or [steps, b].

    Raises:
      ValueError: for an unknown ramp.

    >>> scales("linear", 5, 3.0).tolist()
    [1.0, 1.5, 2.0, 2.5, 3.0]
    """
    if ramp not in RAMPS:
        raise ValueError(f"guidance_ramp is {ramp!r}; expected one of {', '.join(map(repr, RAMPS))}.")
    t = np.linspace(0.0, 1.0, steps) if steps > 1 else np.ones(1)
    rounding = 1e-6  # of a time that is given as 1 / 3 or 0.3
    inside = (t >= interval[0] - rounding) & (t <= interval[1] + rounding) | (steps == 1)
    scale = np.asarray(guidance_scale, np.float64)
    return (1 + np.multiply.outer(RAMPS[ramp](t, power) * inside, scale - 1)).astype(np.float32)


def guide(conditional: Float[Array, "*any"], unconditional: Float[Array, "*any"], scale: Any) -> Float[Array, "*any"]:
    """u + s (c - u), written as c + (s - 1) (c - u) so that s = 1 gives c to the bit.

    >>> float(guide(jnp.float32(3.0), jnp.float32(1.0), 2.0))
    5.0
    """
    return conditional + (scale - 1) * (conditional - unconditional)


def unguided(predict: Predict, timed: bool = False) -> GuidedPredict:
    """A predictor for the sampler that uses one branch only; see `guided`."""
    return lambda tokens, step: predict(tokens, step.t) if timed else predict(tokens)


def guided(predict_both: Predict, timed: bool = False) -> GuidedPredict:
    """Guided logits from one call on a batch of 2b: conditional first, then unconditional.

    One call instead of two reads the weights once a step, and the products have twice the rows.

    Args:
      timed: whether the predictor also takes the step's time in [0, 1), as Paella's does.
    """
    both = unguided(predict_both, timed)

    def predict(tokens: Int[Array, "b n"], step: Any) -> Float[Array, "b n v"]:
        conditional, unconditional = jnp.split(both(jnp.concatenate([tokens, tokens]), step), 2)
        scale = jnp.reshape(step.guidance, (-1, 1, 1))  # one for all, or one an example
        return guide(conditional, unconditional, scale)

    return predict


def optional(
    condition: Callable[..., Any],
    logits: Callable[..., Float[Array, "b n v"]],
    codebook_size: int,
    branches: tuple[Any, ...],
    guides: Bool[Array, ""] | bool,
    weights: Float[Array, "b"] | None = None,
    timed: bool = False,
) -> GuidedPredict:
    """As `guided`, branch after branch, the unconditional one only where `guides` says so.

    One program, with the model in it once, draws both ways: what is not meant to be guided need not compile again
    when it is asked for guidance, and pays for the other half only then.

    Args:
      condition: what the model is told in one branch, of that branch's part of `branches`; done once, not each step.
      logits: of (tokens [b, n], what it is told), and of the step's time if `timed`; float32.
      codebook_size: their last axis.
      branches: arrays [k, ...] of the prompts, with weights the other prompts, and the negative prompts.
      weights: of the other prompts, 0 to 1; see `between`.
    """
    conditional = 1 if weights is None else 2
    count = conditional + jnp.asarray(guides, jnp.int32)

    def part(tree: Any, i: Any) -> Any:
        return jax.tree.map(lambda x: x[i], tree)

    def tell(i: Any, told: Any) -> Any:
        return jax.tree.map(lambda every, one: every.at[i].set(one), told, condition(*part(branches, i)))

    shapes = jax.eval_shape(condition, *part(branches, 0))
    nothing = jax.tree.map(lambda x: jnp.zeros((conditional + 1, *x.shape), x.dtype), shapes)
    told = jax.lax.fori_loop(0, count, tell, nothing)

    def predict(tokens: Int[Array, "b n"], step: Any) -> Float[Array, "b n v"]:
        scale = jnp.reshape(step.guidance, (-1, 1, 1))

        def add(i: Any, total: Any) -> Any:
            branch = unguided(lambda tokens, *time: logits(tokens, part(told, i), *time), timed)
            own = branch(tokens, step)
            mixed = own if weights is None else mix(total, own, weights)
            return jnp.where(i == 0, own, jnp.where(i < conditional, mixed, guide(total, own, scale)))

        return jax.lax.fori_loop(0, count, add, jnp.zeros((*tokens.shape, codebook_size)))

    return predict


def mix(first: Float[Array, "b n v"], second: Float[Array, "b n v"], weights: Float[Array, "b"]) -> Array:
    """Logits on the way from the first to the second; weights 0 to 1, of the second."""
    return first + weights[:, None, None] * (second - first)


def between(predict_all: Predict, weights: Float[Array, "b"]) -> Predict:
    """Logits on the way between two prompts, from one call on [first prompts; second prompts; the rest].

    Of equal prompts what one of them gives. The rest, if any, is the unconditional branch; what is made takes the
    place of `guided`'s predictor.

    Args:
      weights: of the second prompts, 0 to 1.
    """
    b = weights.shape[0]

    def predict(tokens: Int[Array, "k n"]) -> Float[Array, "k n v"]:
        logits = predict_all(jnp.concatenate([tokens[:b], tokens]))
        return jnp.concatenate([mix(logits[:b], logits[b : 2 * b], weights), logits[2 * b :]])

    return predict
