"""Mask schedules: which share of the tokens is still masked at time t of decoding, or of training.

MaskGIT (arXiv 2202.04200, section 3.3 and table 3) compares concave schedules (few tokens first),
the linear one, and convex schedules; Muse (arXiv 2301.00704, section 2.8) decodes with the cosine.
"""

import difflib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Share = Any  # a float, a NumPy array or a JAX array; NumPy in, NumPy (float64) out


def _numpy_of(*values: Share) -> ModuleType:
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def cosine(t: Share, tokens: Share = 256) -> Share:
    """cos(pi t / 2)."""
    return _numpy_of(t).cos(t * (np.pi / 2))


def linear(t: Share, tokens: Share = 256) -> Share:
    """1 - t."""
    return 1 - t


def square(t: Share, tokens: Share = 256) -> Share:
    """1 - t^2."""
    return 1 - t**2


def cubic(t: Share, tokens: Share = 256) -> Share:
    """1 - t^3."""
    return 1 - t**3


def circle(t: Share, tokens: Share = 256) -> Share:
    """sqrt(1 - t^2)."""
    return _numpy_of(t).sqrt(1 - t**2)


def arccos(t: Share, tokens: Share = 256) -> Share:
    """2 arccos(t) / pi: the Halton scheduler's (arXiv 2503.17076), concave; the cosine's mirror image."""
    return _numpy_of(t).arccos(t) * (2 / np.pi)


def sqrt(t: Share, tokens: Share = 256) -> Share:
    """1 - sqrt(t)."""
    return 1 - _numpy_of(t).sqrt(t)


def log(t: Share, tokens: Share = 256) -> Share:
    """-log2(t) / log2(tokens), at most 1: the fewer are left, the slower (convex)."""
    xp = _numpy_of(t, tokens)
    t, tokens = xp.maximum(t, 1e-6), xp.maximum(tokens, 2)  # as MaskGIT's code clips t
    return xp.clip(-xp.log2(t) / xp.log2(tokens), 0, 1)


def exponential(t: Share, tokens: Share = 256) -> Share:
    """1 - 2^(-log2(tokens) (1 - t)): all but one part in `tokens` stays masked until near the end."""
    xp = _numpy_of(t, tokens)
    return 1 - xp.exp2(-xp.log2(xp.maximum(tokens, 2)) * (1 - t))


SCHEDULES: Mapping[str, Callable[[Share, Share], Share]] = {
    "cosine": cosine,
    "linear": linear,
    "square": square,
    "cubic": cubic,
    "circle": circle,
    "arccos": arccos,
    "sqrt": sqrt,
    "log": log,
    "exponential": exponential,
}


def masked_share(schedule: str, t: Share, tokens: Share = 256) -> Share:
    """The share of the tokens that is still masked at time t.

    Args:
      schedule: a name in `SCHEDULES`.
      t: time in [0, 1]; 0 is the start, where all is masked, 1 the end.
      tokens: how many tokens were masked at the start; "log" and "exponential" alone depend on it.

    Returns:
      Values in [0, 1], of the kind (NumPy or JAX) of t.

    Raises:
      ValueError: for an unknown schedule.

    >>> masked_share("square", 0.5)
    0.75
    """
    if schedule not in SCHEDULES:
        close = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}.{hint}")
    return SCHEDULES[schedule](t, tokens)


def time(schedule: str, share: float | np.ndarray, tokens: int = 256) -> np.ndarray:
    """The time at which so many are masked: the inverse of `masked_share`, to about 1e-6.

    >>> round(float(time("cosine", 0.5)), 4)
    0.6667
    """
    t = np.linspace(1.0, 0.0, 1 << 16)
    return np.asarray(np.interp(share, masked_share(schedule, t, np.float64(tokens)), t), np.float32)


def counts(schedule: str, steps: int, initially_masked: int | np.ndarray, start_time: float = 0.0) -> np.ndarray:
    """How many tokens are still masked after each decoding step.

    MaskGIT's rule: floor(initially_masked * share((step + 1) / steps)), but every step keeps at
    least one more token and leaves at least one masked for the next, until the last leaves none.
    Where fewer tokens are masked than there are steps, the last of them waits for the last step.

    Computed on the host in float64, so that the floors are exact; the decode loop looks the counts
    up by the number that each example has masked at its start.

    Args:
      schedule: a name in `SCHEDULES`.
      steps: decoding steps, at least 1.
      initially_masked: numbers of masked tokens, any shape.
      start_time: in [0, 1), at which decoding starts; so many are masked then.

    Returns:
      int32 [steps, *initially_masked.shape].

    >>> counts("cosine", 8, 4096).tolist()
    [4017, 3784, 3405, 2896, 2275, 1567, 799, 0]
    >>> counts("linear", 4, 2).tolist()
    [1, 1, 1, 0]
    """
    if steps < 1:
        raise ValueError(f"{steps} decoding steps; expected at least 1.")
    start = np.asarray(initially_masked, np.int64)
    rows, now = [], start

    def share_at(t: float) -> Share:
        return masked_share(schedule, np.float64(start_time + (1 - start_time) * t), start.astype(np.float64))

    for step in range(steps - 1):
        share = share_at((step + 1) / steps) / (share_at(0.0) if start_time else 1.0)
        # 1e-9: what is a whole number on paper, such as 24 * (1 - 1/24), may be a hair less in float64.
        target = np.floor(start * share + 1e-9).astype(np.int64)
        now = np.minimum(np.maximum(np.minimum(target, now - 1), 1), start)
        rows.append(now)
    return np.stack([*rows, np.zeros_like(start)]).astype(np.int32)
