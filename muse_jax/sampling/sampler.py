"""Parallel decoding (MaskGIT section 3.2, Muse section 2.8): one loop for any token predictor.

`make_plan` computes one row of numbers a step before the loop; `decode` runs the loop as one
`lax.scan`. The loop doesn't know which model it drives: it is handed a predictor, a selection rule,
and tokens of which some may be known. It does not know a task either: filling in an empty canvas,
inpainting and editing differ in what is known and in the rule.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from muse_jax.sampling import guidance, schedules, selection

Select = Callable[[jax.Array, selection.Drawn, Any], Bool[Array, " n"]]


class Step(NamedTuple):
    """One row of a plan. Numbers are scalars, or [b] where examples differ."""

    index: Any
    t: Any  # time in [0, 1); of a decode from nothing the share of the steps done before this one
    still_masked: Any  # how many places are masked after it
    guidance: Any
    token_temperature: Any
    choice_temperature: Any
    top_p: Any
    remasking: Any
    typical_p: Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("t", "still_masked", "guidance", "token_temperature", "choice_temperature", "top_p", "typical_p", "remasking")
    ],
    meta_fields=["top_k", "nucleus", "typical", "select"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a decode loop needs besides tokens, predictor and keys.

    The fields up to remasking are arrays, so that other values run the same compiled program; another number
    of steps, another top_k, another rule, or top-p or typical-p switched on, compile again.
    """

    t: Any  # float32 [steps]: time in [0, 1) of each step
    still_masked: Any  # int32 [steps, tokens + 1]: looked up by the number masked at the start
    guidance: Any  # this and the next: float32 [steps], or [steps, b] where examples differ
    token_temperature: Any
    choice_temperature: Any
    top_p: Any
    typical_p: Any
    remasking: Any  # float32 [steps]
    top_k: int = 0  # 0: every code
    nucleus: bool = False  # whether top_p is looked at
    typical: bool = False  # whether typical_p is
    select: Select = selection.most_confident

    @property
    def steps(self) -> int:
        return self.still_masked.shape[0]


class History(NamedTuple):
    """What the loop did, for pictures of it. The first axis is the step."""

    tokens: Int[Array, "steps b n"]  # after the step, with the mask id where a place is still masked
    predicted: Int[Array, "steps b n"]  # the step's proposal for every place
    masked: Bool[Array, "steps b n"]  # after the step


def make_plan(
    *,
    tokens: int,
    num_inference_steps: int,
    grid: tuple[int, int] | None = None,
    schedule: str = "cosine",
    guidance_scale: float | np.ndarray = 1.0,
    guidance_ramp: str = "linear",
    guidance_power: float = 2.0,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    token_temperature: float | np.ndarray = 1.0,
    choice_temperature: float | np.ndarray = 4.5,
    top_k: int = 0,
    top_p: float | np.ndarray = 1.0,
    typical_p: float | np.ndarray = 1.0,
    selection_rule: str = "most_confident",
    remasking: float = 0.1,
    start_time: float = 0.0,
) -> Plan:
    """The plan of a decode; the words are those of a config's `sample` section.

    Args:
      tokens: places of an example (its masked ones may be fewer, and differ in a batch).
      num_inference_steps: decoding steps, at least 1.
      grid: rows and columns of the tokens, for rules that look at places; by default one row.
      schedule: a name in `schedules.SCHEDULES`.
      guidance_scale: s in u + s (c - u); 1 is off. This and the next numbers: one, or one an example.
      guidance_ramp: a name in `guidance.RAMPS`.
      guidance_power: of the ramp "power_cosine".
      guidance_start, guidance_end: times in [0, 1] between which there is guidance.
      token_temperature: divides the logits that tokens are drawn from; 0 takes the likeliest.
      choice_temperature: of the noise on the confidence; falls linearly to 0 at the last step.
      top_k: draw from the k likeliest codes; 0 is off.
      top_p: draw from the likeliest codes that together have this probability; 1 is off.
      typical_p: the same of the codes whose surprise is nearest to the one expected, see `typical`; 1 is off.
      selection_rule: a name in `selection.RULES`.
      remasking: of the rule "remask", see there; in [0, 1].
      start_time: in [0, 1), where what is masked at the start is what is masked then.

    Raises:
      ValueError: naming the setting that cannot be.
    """
    numbers = {
        "guidance_scale": guidance_scale,
        "token_temperature": token_temperature,
        "choice_temperature": choice_temperature,
        "top_p": top_p,
        "typical_p": typical_p,
        "guidance_power": guidance_power,
        "remasking": remasking,
    }
    for name, value in numbers.items():
        bad = [x for x in np.ravel(value).tolist() if not np.isfinite(x) or x < 0]
        if bad:
            raise ValueError(f"{name} is {bad[0]}; expected a finite number of at least 0.")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; expected at least 1.")
    for name, value in (("top_p", top_p), ("typical_p", typical_p)):
        if np.min(value) == 0 or np.max(value) > 1:
            raise ValueError(f"{name} is {np.max(value)}; expected more than 0 and at most 1 (off).")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; expected at least 1, or 0 (off).")
    if remasking > 1:
        raise ValueError(f"remasking is {remasking}; expected a share, at most 1.")
    if not 0 <= guidance_start <= guidance_end <= 1:
        raise ValueError(
            f"guidance_start is {guidance_start} and guidance_end {guidance_end}; expected 0 <= start <= end <= 1."
        )
    if selection_rule not in selection.RULES:
        known = ", ".join(map(repr, selection.RULES))
        raise ValueError(f"selection_rule is {selection_rule!r}; expected one of {known}.")
    constant = np.ones(num_inference_steps)
    annealed = 1 - np.arange(1, num_inference_steps + 1) / num_inference_steps
    done = np.arange(num_inference_steps) / num_inference_steps
    return Plan(
        t=(start_time + (1 - start_time) * done).astype(np.float32),
        still_masked=schedules.counts(schedule, num_inference_steps, np.arange(tokens + 1), start_time),
        guidance=guidance.scales(
            guidance_ramp, num_inference_steps, guidance_scale, guidance_power, (guidance_start, guidance_end)
        ),
        token_temperature=np.multiply.outer(constant, token_temperature).astype(np.float32),
        choice_temperature=np.multiply.outer(annealed, choice_temperature).astype(np.float32),
        top_p=np.multiply.outer(constant, top_p).astype(np.float32),
        typical_p=np.multiply.outer(constant, typical_p).astype(np.float32),
        remasking=np.multiply.outer(constant, remasking).astype(np.float32),
        top_k=top_k,
        nucleus=bool(np.min(top_p) < 1),
        typical=bool(np.min(typical_p) < 1),
        select=selection.RULES[selection_rule](*(grid or (1, tokens))),
    )


def draw(
    key: jax.Array,
    logits: Float[Array, "n v"],
    temperature: Float[Array, ""] | float = 1.0,
    *,
    top_k: int = 0,
    top_p: Float[Array, ""] | float | None = None,
    typical_p: Float[Array, ""] | float | None = None,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Draws a token for every place: temperature, then top-k, then top-p, then typical-p.

    The Gumbel-max trick, argmax(logits + temperature * noise), draws from softmax(logits /
    temperature) and takes the likeliest at temperature 0. Nothing is sorted, except the k of top-k.

    Args:
      top_k: 0 is off. Of equal logits at the border the codes with the lower ids stay.
      top_p: None is off; else in (0, 1]. The likeliest code always stays.
      typical_p: None is off; else in (0, 1]. The most typical code always stays.

    Returns:
      tokens, and the log-probability of each under softmax(logits), without temperature or filters.
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    values, ids = jax.lax.top_k(logits, min(top_k, logits.shape[-1])) if top_k else (logits, None)
    allowed = values
    for keep, mass in ((nucleus, top_p), (typical, typical_p)):
        if mass is not None:
            scaled = (allowed - allowed.max(axis=-1, keepdims=True)) / jnp.maximum(temperature, 1e-6)
            allowed = jnp.where(keep(jax.nn.softmax(scaled, axis=-1), mass), allowed, -jnp.inf)
    # A flat draw gives the same numbers, and XLA compiles it for the CPU in a fifth of the time.
    noise = jax.random.gumbel(key, (values.size,)).reshape(values.shape)
    rank = _argmax(allowed + temperature * noise)[:, None]
    token = rank if ids is None else jnp.take_along_axis(ids, rank, axis=-1)
    return token[:, 0].astype(jnp.int32), jnp.take_along_axis(values, rank, axis=-1)[:, 0] - total


def nucleus(p: Float[Array, "*n v"], top_p: Float[Array, ""] | float) -> Bool[Array, "*n v"]:
    """The likeliest codes that together reach probability top_p (Holtzman et al. 2020, section 3.1).

    A code is inside while the codes likelier than it have less than top_p together; equals go
    together. The border is found by bisection over the bits of p, which for non-negative floats are
    ordered as they are: 31 masked sums took a twentieth of the time of a sort on CPU.

    >>> nucleus(jnp.array([0.1, 0.5, 0.3, 0.1]), 0.6).tolist()
    [False, True, True, False]
    """
    return _first(p, p, top_p)


def typical(p: Float[Array, "*n v"], typical_p: Float[Array, ""] | float) -> Bool[Array, "*n v"]:
    """Locally typical codes (Meister et al. 2022, section 4): as surprising as is to be expected.

    Those whose -log p is nearest to the entropy, until they reach probability typical_p together;
    Paella takes 0.2.

    >>> typical(jnp.array([0.5, 0.3, 0.1, 0.1]), 0.2).tolist()
    [False, True, False, False]
    """
    surprise = -jnp.log(p)
    entropy = jnp.sum(jnp.where(p > 0, p * surprise, 0), axis=-1, keepdims=True)
    return _first(1 / (1 + jnp.abs(surprise - entropy)), p, typical_p)


def _first(order: Float[Array, "*n v"], p: Float[Array, "*n v"], mass: Any) -> Bool[Array, "*n v"]:
    """The codes first in order, the highest numbers, until they have the probability `mass`; order is at least 0."""
    bits = jax.lax.bitcast_convert_type(order.astype(jnp.float32), jnp.int32)

    def halve(_, interval):
        outside, inside = interval
        middle = outside + (inside - outside) // 2
        fits = jnp.sum(jnp.where(bits > middle, p, 0), axis=-1, keepdims=True) < mass
        return jnp.where(fits, outside, middle), jnp.where(fits, middle, inside)

    top = bits.max(axis=-1, keepdims=True)
    return bits >= jax.lax.fori_loop(0, 31, halve, (jnp.full_like(top, -1), top))[1]


def _argmax(x: Float[Array, "*n v"]) -> Int[Array, "*n"]:
    """`jnp.argmax` as two plain reductions: XLA's CPU backend runs its own five times slower."""
    last = x.shape[-1] - 1
    return jnp.min(jnp.where(x == x.max(axis=-1, keepdims=True), jnp.arange(last + 1), last), axis=-1)


def noise(keys: jax.Array, tokens: int, codebook_size: int) -> Int[Array, "b n"]:
    """A random code for each place, of each example by its key: what Paella starts from and goes back to.

    `decode` renoises as Paella does with this as `mask_id`, `revisable` and the rule `selection.anywhere`.
    Differs from the paper: its code puts each place back by a coin of its own; here the count is exact.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2**31 - 1)  # no step's
    return jax.vmap(lambda key: jax.random.randint(key, (tokens,), 0, codebook_size))(keys)


def decode(
    predict: guidance.GuidedPredict,
    tokens: Int[Array, "b n"],
    plan: Plan,
    keys: jax.Array,
    mask_id: int | Int[Array, "b n"],
    *,
    known: Bool[Array, "b n"] | None = None,
    select: Select | None = None,
    revisable: bool = False,
    history: bool = False,
) -> tuple[Int[Array, "b n"], History | None]:
    """Fills in the masked tokens in ``plan.steps`` steps. Meant to run inside a jitted function.

    Args:
      predict: (tokens [b, n], step) -> logits [b, n, codebook]; `guidance` makes one of a model.
      tokens: start; `mask_id` where masked.
      plan: from `make_plan`, with counts for n tokens.
      keys: one key an example, [b]: what an example draws depends on its own key alone.
      mask_id: what a masked place holds; an array where places differ.
      known: places that never change; without it, those that aren't masked in `tokens`.
      select: the selection rule; by default the plan's.
      revisable: draw all unknown places at every step, instead of those masked now.
      history: whether to return what every step did.

    Returns:
      tokens without a masked place, and the history or None.
    """
    blank = jnp.broadcast_to(jnp.asarray(mask_id, tokens.dtype), tokens.shape)
    known = tokens != blank if known is None else known
    masked = (tokens == blank) & ~known
    # Each example's own column: examples of a batch may have any number of known tokens.
    still_masked = jnp.asarray(plan.still_masked)[:, masked.sum(axis=-1)]
    rows = _rows(plan, still_masked)
    one = jax.vmap(partial(_propose, plan=plan, select=select or plan.select))

    def step(carry, row):
        tokens, masked, log_prob = carry
        open_ = ~known if revisable else masked
        keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, row.index)
        per_example = jax.tree.map(lambda x: jnp.broadcast_to(x, masked.shape[:1]), row)
        predicted, log_prob, again = one(keys_now, predict(tokens, row), tokens, log_prob, open_, known, per_example)
        masked = again & ~known
        tokens = jnp.where(masked, blank, predicted)
        return (tokens, masked, log_prob), History(tokens, predicted, masked) if history else None

    (tokens, *_), steps = jax.lax.scan(step, (tokens, masked, jnp.zeros(tokens.shape)), rows)
    return tokens, steps


def _rows(plan: Plan, still_masked: Int[Array, "steps b"]) -> Step:
    index = jnp.arange(plan.steps)
    return Step(
        index=index,
        t=plan.t,
        still_masked=still_masked,
        guidance=plan.guidance,
        token_temperature=plan.token_temperature,
        choice_temperature=plan.choice_temperature,
        top_p=plan.top_p,
        typical_p=plan.typical_p,
        remasking=plan.remasking,
    )


def _propose(key, logits, tokens, log_prob, open_, known, step: Step, *, plan: Plan, select: Select):
    """One example's step: a token for every open place, how likely each was, and which places are masked again."""
    key_token, key_choice = jax.random.split(key)
    top_p = step.top_p if plan.nucleus else None
    typical_p = step.typical_p if plan.typical else None
    token, likely = draw(key_token, logits, step.token_temperature, top_k=plan.top_k, top_p=top_p, typical_p=typical_p)
    predicted, log_prob = jnp.where(open_, token, tokens), jnp.where(open_, likely, log_prob)
    return predicted, log_prob, select(key_choice, selection.Drawn(predicted, log_prob, open_, known), step)
