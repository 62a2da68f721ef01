"""The protocol between the trainer and what is learned.

The trainer knows tasks by this file alone. A task is built from specs; parameters are nested dicts
of arrays; everything here that takes arrays can be jitted.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Params = Any  # nested dict of arrays
Batch = Mapping[str, jax.Array]


class Mean(NamedTuple):
    """A metric that can be added up over micro-batches, batches and devices: total / weight."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> "Mean":
        """The mean of `values`, each counted `weights` times (once without weights)."""
        values = jnp.asarray(values, jnp.float32)
        weights = jnp.ones_like(values) if weights is None else jnp.broadcast_to(weights, values.shape)
        return cls(jnp.sum(values * weights), jnp.sum(weights).astype(jnp.float32))

    def __add__(self, other: "Mean") -> "Mean":  # type: ignore[override]
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> jax.Array:
        """total / weight; NaN where nothing was counted."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1), jnp.nan)


Metrics = Mapping[str, Mean]


@runtime_checkable
class Task(Protocol):
    """What is learned. Labels are free strings; "frozen" means that no optimizer touches it."""

    def init(self, key: jax.Array) -> Params:
        """Initial parameters as Flax metadata boxes (`nn.LogicallyPartitioned`), jit-able."""

    def frozen(self) -> Params:
        """Parameters of other networks that the steps read and nobody trains; {} if none."""

    def labels(self, params: Params) -> Params:
        """A tree like `params` of label strings: which optimizer each parameter has."""

    def grads(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[Params, Metrics, Any]:
        """Gradients, metrics (with "loss" among them), and extras for `after_update`.

        `key` is the step's; what is random for an example is drawn from
        ``fold_in(key, example_id)``, so that no mesh and no batch order changes it.
        """

    def merge(self, extras: Any, more: Any) -> Any:
        """The extras of two micro-batches as those of both (`optimizer.accumulate`)."""

    def after_update(self, params: Params, extras: Any, key: jax.Array, step: jax.Array) -> Params:
        """What changes parameters besides the optimizer (dead codes revived); often the identity."""

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
        """Metrics on a held-out batch, without dropout and at fixed mask ratios."""

    def samples(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Pictures for the log, of a few examples: name -> uint8 [n, h, w, 3]; {} if there is nothing to see."""
