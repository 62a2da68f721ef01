"""One step of training, as one function: what is compiled, on a laptop and ahead of time for a pod.

Randomness: key = fold_in(fold_in(seed, stream), step); nothing random is kept in the state.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from muse_jax.specs import Spec
from muse_jax.training import optimizer as optimizers
from muse_jax.training import sharding, trees

# Streams of random numbers under the run's one seed.
INIT, TRAIN, UPDATE, EVALUATE, SAMPLES = range(5)


class State(NamedTuple):
    """What a checkpoint restores. `ema` is None without EMA; `step` counts steps done."""

    step: jax.Array
    params: Any
    optimizer: Any
    ema: Any = None

    @property
    def best(self) -> Any:
        """The parameters that evaluation, samples and other stages use."""
        return self.params if self.ema is None else self.ema


class Total(NamedTuple):
    """A metric made here; adds up like the tasks' `Mean`."""

    total: jax.Array
    weight: jax.Array


def stream_key(seed: int, stream: int) -> jax.Array:
    """The key of one stream."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def compiler_options(options: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Of `train.tpu_options` those for a device: the ones for all TPUs and then its kind's; none where it is no TPU."""
    if device.platform != "tpu":
        return {}
    everywhere = {name: value for name, value in options.items() if not isinstance(value, Mapping)}
    return everywhere | dict(options.get(device.device_kind, {}))


class Program:
    """The functions of a run and where everything they touch lives.

    Attributes:
      labels, axes: the parameters' optimizer labels (a tree) and logical axis names ({name: names}).
      state, frozen: trees of ShapeDtypeStructs with shardings.
    """

    def __init__(self, spec: Spec, task: Any, mesh: Mesh | AbstractMesh, frozen: Any):
        self.spec, self.task, self.mesh = spec, task, mesh
        sharding.check_batch(spec, mesh)
        boxes = jax.eval_shape(task.init, stream_key(spec.seed, INIT))
        params = sharding.unbox(boxes)
        self.axes = sharding.axis_names(boxes)
        self.labels = task.labels(params)
        self.tx = optimizers.make_optimizer(spec.optimizer, self.labels, self.axes, spec.train.steps)
        self.schedule = optimizers.make_schedule(spec.optimizer, spec.train.steps)
        self._train_key, self._update_key = (stream_key(spec.seed, stream) for stream in (TRAIN, UPDATE))
        self.batch_sharding = sharding.batch_sharding(mesh, spec.rules)
        state = jax.eval_shape(self._started, params)
        self.state = _abstract(state, self._state_shardings(state, boxes))
        specs = sharding.param_specs(frozen, spec.rules_of_frozen, mesh)
        frozen = sharding.unbox(frozen)
        self.frozen = _abstract(frozen, sharding.shardings(frozen, specs, mesh))

    def _state_shardings(self, state: State, boxes: Any) -> State:
        specs = sharding.param_specs(boxes, self.spec.rules, self.mesh)
        params = sharding.shardings(state.params, specs, self.mesh)
        inner = sharding.optimizer_specs(state.optimizer, state.params, specs)
        return State(
            NamedSharding(self.mesh, PartitionSpec()),
            params,
            sharding.shardings(state.optimizer, inner, self.mesh),
            None if state.ema is None else params,
        )

    def _initial(self, key: jax.Array) -> State:
        return self._started(sharding.unbox(self.task.init(key)))

    def _started(self, params: Any) -> State:
        # A copy, not the same array: the state is donated, and a buffer can be donated once.
        ema = jax.tree.map(jnp.copy, params) if self.spec.optimizer.ema_decay else None
        return State(jnp.zeros((), jnp.int32), params, self.tx.init(params), ema)

    def initial(self) -> State:
        """The state at step 0, made in its shards: no device or host ever holds the whole."""
        with sharding.layout(self.mesh, self.spec.rules):
            # It runs once: on a CPU, compiling it without optimizations saves seconds and costs a fraction of one.
            options = {"xla_backend_optimization_level": 0} if self.mesh.devices.flat[0].platform == "cpu" else None
            make = jax.jit(self._initial, out_shardings=shardings_of(self.state), compiler_options=options)
            return make(stream_key(self.spec.seed, INIT))

    def lower_train(self, batch: Any) -> Any:
        """The lowered train step (state, frozen, batch) -> (state, metrics); `train.donate` donates its state."""
        precision = self.spec.train.matmul_precision or jax.config.jax_default_matmul_precision
        with sharding.layout(self.mesh, self.spec.rules), jax.default_matmul_precision(precision):
            donated = 0 if self.spec.train.donate else ()
            step = jax.jit(self.train_step, donate_argnums=donated, out_shardings=(shardings_of(self.state), None))
            return step.lower(self.state, self.frozen, batch)

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler, for the train step: `train.tpu_options` where it is for TPUs."""
        return compiler_options(self.spec.train.tpu_options, self.mesh.devices.flat[0])

    def compile_train(self, lowered: Any) -> Any:
        """The train step of `lower_train`, compiled with the `options`."""
        return lowered.compile(self.options or None)

    def lower_evaluate(self, batch: Any) -> Any:
        """The lowered evaluation (params, frozen, batch, index) -> metrics."""
        with sharding.layout(self.mesh, self.spec.rules):
            index = jax.ShapeDtypeStruct((), jnp.int32)
            return jax.jit(self.evaluate).lower(self.state.params, self.frozen, batch, index)

    def lower_samples(self, batch: Any) -> Any:
        """The lowered drawing of pictures for the log (params, frozen, batch) -> {name: pictures}, whole everywhere."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        with sharding.layout(self.mesh, self.spec.rules):
            return jax.jit(self.samples, out_shardings=everywhere).lower(self.state.params, self.frozen, batch)

    def abstract_batch(self, batch: Mapping[str, Any]) -> Any:
        """Shapes, dtypes and shardings of a batch of which each process has its part on the host."""
        _, parts = sharding.process_part(self.batch_sharding, self.spec.train.batch_size)
        return _abstract(batch, jax.tree.map(lambda _: self.batch_sharding, batch), parts)

    def train_step(self, state: State, frozen: Any, batch: Any) -> tuple[State, dict[str, Any]]:
        """One step. If the loss, the gradient or the new parameters aren't finite, nothing but `step` changes."""
        key = jax.random.fold_in(self._train_key, state.step)
        grads, metrics, extras = self._accumulate(state.params, frozen, batch, key, state.step)
        metrics = dict(metrics)
        grads = self._placed(jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params))
        norms = self._grad_norms(grads)
        updates, optimizer = self.tx.update(grads, state.optimizer, state.params)
        params = jax.tree.map(_apply, self.labels, state.params, updates)
        key = jax.random.fold_in(self._update_key, state.step)
        params = self.task.after_update(params, extras, key, state.step)
        param_norm = optax.tree.norm([p.astype(jnp.float32) for p in jax.tree.leaves(params)])
        finite = jnp.isfinite(_value(metrics["loss"])) & jnp.isfinite(norms["grad_norm"]) & jnp.isfinite(param_norm)
        new = State(state.step + 1, params, optimizer, self._ema(state.ema, params, state.step))
        new = new._replace(
            **{
                name: jax.tree.map(lambda a, b: jnp.where(finite, a, b), getattr(new, name), getattr(state, name))
                for name in ("params", "optimizer", "ema")
            }
        )
        one = jnp.ones((), jnp.float32)
        extra = {**norms, "param_norm": param_norm, "learning_rate": self.schedule(state.step)}
        metrics |= {name: Total(jnp.asarray(value, jnp.float32), one) for name, value in extra.items()}
        metrics["nonfinite"] = Total(1.0 - finite, one)
        return new, metrics

    def _accumulate(self, params: Any, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
        """Gradients over micro-batches by one scan, each weighted as its loss is weighted.

        Micro-batch i holds the examples i, i + n, i + 2n, ..., so that each device splits what it has
        and nothing moves. The task merges their extras.
        """
        count = self.spec.optimizer.accumulate
        if count == 1:
            return self._grads(params, frozen, batch, key, step)
        micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(batch: Any) -> Any:
            grads, metrics, extras = self._grads(params, frozen, batch, key, step)
            weight = metrics["loss"].weight
            return jax.tree.map(lambda g: g * weight.astype(g.dtype), grads), metrics, extras

        def body(carry: Any, batch: Any) -> Any:
            *found, extras = one(batch)
            return jax.tree.map(jnp.add, carry, tuple(found)), extras

        *shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tuple(shapes))
        (grads, metrics), extras = jax.lax.scan(body, start, micro)
        weight = metrics["loss"].weight
        each = (jax.tree.map(operator.itemgetter(i), extras) for i in range(count))
        extras = functools.reduce(self.task.merge, each)
        return jax.tree.map(lambda g: g / weight.astype(g.dtype), grads), metrics, extras

    def _grads(self, *args: Any) -> Any:
        """The task's, in `optimizer.gradient_dtype`."""
        grads, metrics, extras = self.task.grads(*args)
        dtype = jnp.dtype(self.spec.optimizer.gradient_dtype)
        return jax.tree.map(lambda g: g.astype(dtype) if g.dtype == jnp.float32 else g, grads), metrics, extras

    def _placed(self, grads: Any) -> Any:
        """Gradients where their parameters are. Left to XLA, parameters may travel to a gradient, and back."""
        if self.mesh.size == 1:
            return grads
        return jax.lax.with_sharding_constraint(grads, shardings_of(self.state.params))

    def _grad_norms(self, grads: Any) -> dict[str, jax.Array]:
        """The norm of what the optimizers see; of each label too where there are several."""
        groups: dict[str, list[jax.Array]] = {}
        for label, grad in zip(jax.tree.leaves(self.labels), jax.tree.leaves(grads), strict=True):
            if label != optimizers.FROZEN:
                groups.setdefault(label, []).append(grad.astype(jnp.float32))
        norms = {"grad_norm": optax.tree.norm(list(groups.values()))}
        if len(groups) > 1:
            norms |= {f"grad_norm/{label}": optax.tree.norm(leaves) for label, leaves in groups.items()}
        return norms

    def _ema(self, ema: Any, params: Any, step: jax.Array) -> Any:
        """ema + (1 - d) (params - ema), with d = min(decay, (1 + step) / (10 + step)) so that it forgets the start.

        In this form an EMA of what stays the same stays the same bit for bit; it is kept in float32.
        """
        if ema is None:
            return None
        decay = jnp.minimum(self.spec.optimizer.ema_decay, (1.0 + step) / (10.0 + step))

        def average(label: str, old: jax.Array, new: jax.Array) -> jax.Array:
            return new if label == optimizers.FROZEN else old + ((1.0 - decay) * (new - old)).astype(old.dtype)

        return jax.tree.map(average, self.labels, ema, params)

    def evaluate(self, params: Any, frozen: Any, batch: Any, index: jax.Array) -> Any:
        """The task's metrics on held-out batch `index`; the same every time for the same parameters."""
        key = jax.random.fold_in(stream_key(self.spec.seed, EVALUATE), index)
        return self.task.evaluate(params, frozen, batch, key)

    def samples(self, params: Any, frozen: Any, batch: Any) -> Any:
        """The task's pictures; from the same random numbers every time, so that progress can be seen."""
        return self.task.samples(params, frozen, batch, stream_key(self.spec.seed, SAMPLES))


def _apply(label: str, param: jax.Array, update: jax.Array) -> jax.Array:
    # What is frozen isn't even added to: -0.0 + 0.0 would change its bits.
    return param if label == optimizers.FROZEN else (param + update).astype(param.dtype)


def _value(metric: Any) -> jax.Array:
    return metric.total / metric.weight


def _abstract(tree: Any, shards: Any, parts: int = 1) -> Any:
    def one(leaf: Any, shard: Any) -> jax.ShapeDtypeStruct:
        shape = (leaf.shape[0] * parts, *leaf.shape[1:]) if leaf.shape else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=shard)

    return jax.tree.map(one, tree, shards)


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


@jax.jit
def copied(state: State) -> State:
    """The state in buffers of its own."""
    return jax.tree.map(jnp.copy, state)


def checkpoint_items(state: State) -> dict[str, Any]:
    """{item of a checkpoint: {leaf's name: leaf}}; `ema` only where there is one."""
    items = {"params": state.params, "optimizer": state.optimizer}
    if state.ema is not None:
        items["ema"] = state.ema
    return {item: trees.named_leaves(tree) for item, tree in items.items()}


def from_items(abstract: State, items: Mapping[str, Any], step: int) -> State:
    """The state with these leaves; the inverse of `checkpoint_items`."""
    filled = {item: trees.refill(getattr(abstract, item), leaves) for item, leaves in items.items()}
    shard = abstract.step.sharding
    return State(sharding.place(np.int32(step), shard), **filled)
