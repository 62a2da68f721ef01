"""Optimizers: AdamW, Adafactor and Muon with warm-up, clipping and a config for each label.

Each parameter's label (`Task.labels`) picks its optimizer; "frozen" has none and no state. What an
optimizer does with a parameter depends on its logical axes: stacked layers ("layers" first) are
treated layer by layer, as if they had never been stacked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from muse_jax.specs import OptimizerSpec, SpecError, label_spec
from muse_jax.training import trees
from muse_jax.training.sharding import LAYERS

FROZEN = "frozen"

Axes = Mapping[str, Sequence[str | None]]

# Tables looked up by an index rather than multiplied with: no weight decay, no orthogonalisation.
_TABLES = ("vocab", "positions", "buckets")
_HEADS = ("heads", "head_dim")
_SPATIAL = ("rows", "columns")  # of a convolution


def make_optimizer(spec: OptimizerSpec, labels: Any, axes: Axes, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
      spec: the config's `optimizer` section; `overrides` changes fields for single labels.
      labels: a tree like the parameters, of labels.
      axes: {parameter name: its logical axis names} (`sharding.axis_names`).
      steps: the run's length, where the schedule ends.

    Raises:
      SpecError: for an override of a label that no parameter has, or of an unknown field.
    """
    present = sorted(set(trees.named_leaves(labels).values()))  # in the same order in every process
    for label in spec.overrides:
        if label not in present:
            known = ", ".join(present)
            raise SpecError(f"optimizer.overrides.{label}: no parameter has this label; the task's are {known}.")
    transforms = {
        label: optax.set_to_zero() if label == FROZEN else _one(label_spec(spec, label), axes, steps)
        for label in present
    }
    return optax.partition(transforms, labels)


def make_schedule(spec: OptimizerSpec, steps: int, peak: float | None = None) -> Callable[[Any], jax.Array]:
    """Learning rate as a function of the number of updates made.

    Linear warm-up, peak * (n + 1) / warmup_steps, so that the first update already moves; then, with
    p the share of the remaining steps that are done,

      constant: peak;  linear: peak * (1 - (1 - f) p);  cosine: peak * (f + (1 - f) (1 + cos(pi p)) / 2)

    where f is `final_scale`.
    """
    peak = spec.learning_rate if peak is None else peak
    if spec.schedule not in ("constant", "linear", "cosine"):
        raise SpecError(f"optimizer.schedule is {spec.schedule!r}; expected 'cosine', 'constant' or 'linear'.")

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1) / max(1, spec.warmup_steps))
        done = jnp.clip((count - spec.warmup_steps) / max(1, steps - spec.warmup_steps), 0.0, 1.0)
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done))}[spec.schedule]
        final = 1.0 if spec.schedule == "constant" else spec.final_scale
        return peak * warm * (final + (1 - final) * left)

    return schedule


def _one(spec: OptimizerSpec, axes: Axes, steps: int) -> optax.GradientTransformation:
    kinds = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}
    if spec.name not in kinds:
        raise SpecError(f"optimizer.name is {spec.name!r}; expected one of {', '.join(map(repr, kinds))}.")
    chain = [optax.clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
    return optax.chain(*chain, kinds[spec.name](spec, axes, steps))


def _adamw(spec: OptimizerSpec, axes: Axes, steps: int, peak: float | None = None) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(spec.b1, spec.b2, eps=1e-8),
        _decay(spec, axes),
        optax.scale_by_learning_rate(make_schedule(spec, steps, peak)),
    )


def _adafactor(spec: OptimizerSpec, axes: Axes, steps: int) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018) with momentum b1 and second moments that decay by b2.

    The paper gives b1 0.9, b2 0.96 and weight decay 0.045, and no more. Chosen here: b2 is constant
    and its bias corrected as in Adam, instead of growing as 1 - t**-0.8; updates are clipped to RMS 1;
    the learning rate isn't scaled by the parameter's RMS (1e-4 would be too small by far); weight
    decay is decoupled and multiplied by the learning rate.
    """

    def second_moment_decay(count: Any, b2: Any) -> jax.Array:
        t = jnp.asarray(count + 1, jnp.float32)
        return b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)

    core = optax.chain(
        optax.scale_by_factored_rms(decay_rate=spec.b2, decay_rate_fn=second_moment_decay),
        optax.clip_by_block_rms(1.0),
    )
    return optax.chain(
        _by_layer(core, axes),
        optax.ema(spec.b1) if spec.b1 else optax.identity(),
        _decay(spec, axes),
        optax.scale_by_learning_rate(make_schedule(spec, steps)),
    )


def _by_layer(core: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """`core` on each layer of stacked parameters by itself.

    Over the whole stack, Adafactor would factor the layer axis and clip all layers by their common
    RMS. Parameters are grouped by their number of layers, since one vmap has one size.
    """

    def groups(params: Any) -> Any:
        stacked = {name for name, names in axes.items() if names and names[0] == LAYERS}
        return trees.map_named(lambda name, p: f"layers_{p.shape[0]}" if name in stacked else "single", params)

    vmapped = optax.GradientTransformation(jax.vmap(core.init), jax.vmap(core.update))

    def transformation(params: Any) -> optax.GradientTransformation:
        found = groups(params)
        present = sorted(set(jax.tree.leaves(found)))  # as above
        return optax.partition({g: core if g == "single" else vmapped for g in present}, found)

    return optax.GradientTransformation(
        lambda params: transformation(params).init(params),
        lambda updates, state, params=None: transformation(params).update(updates, state, params),
    )


def _muon(spec: OptimizerSpec, axes: Axes, steps: int) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices inside the network, AdamW for everything else.

    `b1` is the momentum of both, `b2` AdamW's; `adam_learning_rate` AdamW's rate, if it is not 0.
    """

    def kind(params: Any) -> Any:
        return trees.map_named(
            lambda name, p: "matrix" if matrix_axes(name, axes.get(name), p.shape) else "rest", params
        )

    def dimensions(params: Any) -> Any:
        return trees.map_named(lambda name, p: matrix_axes(name, axes.get(name), p.shape), params)

    matrix = optax.chain(
        scale_by_muon(beta=spec.b1, weight_dimension_numbers=dimensions),
        _scale_by_shape(dimensions),
        _decay(spec, axes),
        optax.scale_by_learning_rate(make_schedule(spec, steps)),
    )
    rest = _adamw(spec, axes, steps, spec.adam_learning_rate or spec.learning_rate)
    return optax.partition({"matrix": matrix, "rest": rest}, kind)


def _scale_by_shape(dimensions: Callable[[Any], Any]) -> optax.GradientTransformation:
    """sqrt(max(1, outputs / inputs)), with which one learning rate suits matrices of all shapes (Jordan 2024)."""

    def update(updates: Any, params: Any) -> Any:
        del params
        found = dimensions(updates)

        def scaled(update: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
            fan_in, fan_out = (math.prod(update.shape[a] for a in part) for part in numbers)
            return update * math.sqrt(max(1.0, fan_out / fan_in))

        return jax.tree.map(scaled, updates, found)

    return optax.stateless(update)


def matrix_axes(name: str, axes: Sequence[str | None] | None, shape: Sequence[int]) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are the inputs and outputs of a matrix; None if it is no inner matrix.

    Kernels have their inputs first: [embed, heads, head_dim], [heads, head_dim, embed],
    [rows, columns, channels_in, channels_out]. Axes that are neither, such as the layers', are
    treated one by one. Embeddings, heads that predict the vocabulary, norms and biases are none.
    """
    if not decays(name, axes, shape):
        return None
    names = list(axes or (None,) * len(shape))
    first = 1 if names[0] == LAYERS else 0
    if names[-1] in _TABLES:
        return None
    inputs = first
    if names[inputs] in _HEADS:
        while names[inputs + 1] in _HEADS:
            inputs += 1
    elif names[inputs] in _SPATIAL:
        while names[inputs] in _SPATIAL:
            inputs += 1
    if inputs + 1 >= len(shape):
        return None
    return MuonDimensionNumbers(tuple(range(first, inputs + 1)), tuple(range(inputs + 1, len(shape))))


def decays(name: str, axes: Sequence[str | None] | None, shape: Sequence[int]) -> bool:
    """Whether weight decay acts on a parameter: on kernels; not on biases, norms and embedding tables."""
    names = list(axes or (None,) * len(shape))
    if names and names[0] == LAYERS:
        names = names[1:]
    if len(names) < 2 or name.split("/")[-1] in ("bias", "scale"):
        return False
    if all(n in _HEADS for n in names):  # a bias of [heads, head_dim]
        return False
    return names[0] not in _TABLES and not {"positions", "buckets"} & set(names)


def _decay(spec: OptimizerSpec, axes: Axes) -> optax.GradientTransformation:
    if not spec.weight_decay:
        return optax.identity()
    return optax.add_decayed_weights(
        spec.weight_decay,
        lambda params: trees.map_named(lambda name, p: decays(name, axes.get(name), p.shape), params),
    )
