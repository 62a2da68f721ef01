"""Schedules, labels, and optimizers that treat stacked layers as if they had never been stacked."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muse_jax import specs
from muse_jax.training import optimizer, sharding, trees

AXES = {
    "layers/query/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/query/bias": ("layers", "heads", "head_dim"),
    "layers/out/kernel": ("layers", "heads", "head_dim", "embed"),
    "layers/norm/scale": ("layers", "embed"),
    "layers/mlp/kernel": ("layers", "embed", "mlp"),
    "table": ("vocab", "embed"),
    "head/kernel": ("embed", "vocab"),
    "relative": ("heads", "buckets"),
    "conv/kernel": ("rows", "columns", "channels_in", "channels_out"),
    "plain": (None, None),
}
SIZES = {"layers": 3, "embed": 8, "heads": 2, "head_dim": 4, "mlp": 16, "vocab": 5, "buckets": 6, "rows": 3,
         "columns": 3, "channels_in": 4, "channels_out": 6, None: 3}  # fmt: skip


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaves = {n: rng.normal(size=[SIZES[a] for a in axes]).astype(np.float32) * scale for n, axes in AXES.items()}
    return trees.nest({n: jnp.asarray(leaf) for n, leaf in leaves.items()})


def updates_of(spec, steps=3, params=None, axes=AXES):
    """Updates of the last of some steps."""
    params = tree(0) if params is None else params
    tx = optimizer.make_optimizer(spec, jax.tree.map(lambda _: "all", params), axes, 10)

    @jax.jit
    def run(params):
        state = tx.init(params)
        for seed in range(steps):
            grads = jax.tree.map(lambda p, s=seed: jnp.cos(p * (s + 2)) * jnp.arange(1, 1 + len(p)).reshape(
                -1, *[1] * (p.ndim - 1)) ** 2, params)  # fmt: skip
            updates, state = tx.update(grads, state, params)
        return updates

    return run(params)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - 0.9 * p),
        ("cosine", lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    ],
)
def test_schedules_follow_their_formulas(schedule, expected):
    spec = specs.OptimizerSpec(learning_rate=2.0, schedule=schedule, warmup_steps=4, final_scale=0.1)
    rate = optimizer.make_schedule(spec, 14)
    np.testing.assert_allclose([rate(n) for n in range(4)], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose([rate(n) for n in range(4, 15)], [2 * expected(n / 10) for n in range(11)], rtol=1e-5)
    assert rate(100) == rate(14)
    with pytest.raises(specs.SpecError, match="schedule"):
        optimizer.make_schedule(specs.OptimizerSpec(schedule="step"), 10)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_stacked_layers_are_treated_one_by_one(name, monkeypatch):
    """Updates of a stack equal those of its layers as separate parameters; their gradients differ by a factor of 9."""
    spec = specs.OptimizerSpec(name=name, learning_rate=0.1, weight_decay=0.045, b2=0.96)
    if name == "adafactor":  # small arrays are to be factored too
        real = optax.scale_by_factored_rms
        monkeypatch.setattr(
            optax, "scale_by_factored_rms", lambda **k: real(min_dim_size_to_factor=2, **k)
        )  # fmt: skip
    params = tree(0)
    in_stack = {n: a for n, a in AXES.items() if n.startswith("layers/")}
    stacked = updates_of(spec, 2, {"layers": params["layers"]}, in_stack)["layers"]
    axes = {n.removeprefix("layers/"): a[1:] for n, a in AXES.items() if n.startswith("layers/")}

    @jax.jit
    def of_layer(alone, layer):
        tx = optimizer.make_optimizer(spec, jax.tree.map(lambda _: "all", alone), axes, 10)
        state = tx.init(alone)
        for seed in range(2):
            grads = jax.tree.map(lambda p, s=seed: jnp.cos(p * (s + 2)) * (layer + 1.0) ** 2, alone)
            updates, state = tx.update(grads, state, alone)
        return updates

    for layer in range(3):
        updates = of_layer(jax.tree.map(lambda p, i=layer: p[i], params["layers"]), layer)
        jax.tree.map(lambda a, b, i=layer: np.testing.assert_allclose(a, b[i], rtol=2e-4, atol=1e-6), updates, stacked)


def test_muon_orthogonalises_each_matrix():
    """Singular values of the update of every inner matrix are about 1 times the rate; the others are AdamW's."""
    spec = specs.OptimizerSpec(name="muon", learning_rate=1.0, adam_learning_rate=1e-3, schedule="constant")
    updates = trees.named_leaves(updates_of(spec, steps=1))
    shapes = {"query": (3, 8, 8), "out": (3, 8, 8), "mlp": (3, 8, 16)}
    for name, shape in {**{f"layers/{n}/kernel": s for n, s in shapes.items()}, "conv/kernel": (1, 36, 6)}.items():
        for matrix in np.asarray(updates[name]).reshape(shape):
            values = np.linalg.svd(matrix / math.sqrt(max(1, shape[2] / shape[1])), compute_uv=False)
            # Five iterations bring singular values to 0.7 .. 1.2; the smallest may need more.
            assert values.max() < 1.3, name
            assert np.median(values) > 0.5, name
    for name in ("table", "head/kernel", "layers/norm/scale", "layers/query/bias", "relative"):
        np.testing.assert_allclose(np.abs(updates[name]), 1e-3, rtol=1e-3)


def test_weight_decay_acts_on_kernels_only():
    decayed = {"layers/query/kernel", "layers/out/kernel", "layers/mlp/kernel", "head/kernel", "conv/kernel", "plain"}
    for name in ("adamw", "adafactor", "muon"):
        without, with_decay = (
            trees.named_leaves(updates_of(specs.OptimizerSpec(name=name, weight_decay=w), steps=1)) for w in (0.0, 0.5)
        )
        changed = {n for n in AXES if not np.allclose(without[n], with_decay[n], atol=1e-7)}
        assert changed == decayed
        params = trees.named_leaves(tree(0))
        np.testing.assert_allclose(
            with_decay["conv/kernel"] - without["conv/kernel"], -1e-3 * 0.5 * params["conv/kernel"], atol=1e-6
        )


def test_adafactor_by_hand():
    """One factored matrix: second moments with bias-corrected b2, updates clipped to RMS 1, momentum b1."""
    rng = np.random.default_rng(0)
    param = rng.normal(size=(128, 130)).astype(np.float32)
    grads = [rng.normal(size=param.shape).astype(np.float32) * s for s in (1.0, 10.0)]
    spec = specs.OptimizerSpec(name="adafactor", learning_rate=0.1, schedule="constant", b1=0.9, b2=0.96,
                               weight_decay=0.045)  # fmt: skip
    tx = optimizer.make_optimizer(spec, {"kernel": "all"}, {"kernel": ("embed", "mlp")}, 10)
    state = tx.init({"kernel": jnp.asarray(param)})
    row, column, momentum = np.zeros(128), np.zeros(130), np.zeros(param.shape)
    for t, grad in enumerate(grads, 1):
        updates, state = tx.update({"kernel": jnp.asarray(grad)}, state, {"kernel": jnp.asarray(param)})
        decay = 0.96 * (1 - 0.96 ** (t - 1)) / (1 - 0.96**t)
        square = grad.astype(np.float64) ** 2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1)
        column = decay * column + (1 - decay) * square.mean(0)
        update = grad / np.sqrt(np.outer(row, column) / row.mean())
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        momentum = 0.9 * momentum + 0.1 * update
        expected = -0.1 * (momentum / (1 - 0.9**t) + 0.045 * param)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4, atol=1e-6)
    moments = [leaf.size for name, leaf in trees.named_leaves(state).items() if "/v" in name]
    assert sum(moments) == 128 + 130 + 1


def test_clipping_is_by_label():
    """One label's large gradient doesn't shrink another's; each is clipped to the norm."""
    spec = specs.OptimizerSpec(clip_norm=1.0, overrides={"b": {"clip_norm": 2.0}})
    tx = optimizer.make_optimizer(spec, {"x": "a", "y": "b", "z": "frozen"}, {}, 10)
    grads = {"x": jnp.full(4, 100.0), "y": jnp.full(4, 100.0), "z": jnp.full(4, 1e9)}
    _, state = tx.update(grads, tx.init(grads), grads)
    first = {n.split("/")[1]: leaf for n, leaf in trees.named_leaves(state).items() if "/mu/" in n}
    assert set(first) == {"a", "b"}
    np.testing.assert_allclose(np.linalg.norm(first["a"]), 0.1 * 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(first["b"]), 0.1 * 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nobody": {"b1": 0.5}}, "no parameter has this label; the task's are a"),
        ({"a": {"rate": 0.5}}, "known keys: .*learning_rate"),
        ({"a": {"accumulate": 2}}, "can't be set"),
        ({"a": {"b1": "0.5"}}, "of type str; expected float"),
        ({"a": {"name": "sgd"}}, "expected one of 'adamw', 'adafactor', 'muon'"),
    ],
)
def test_overrides_that_make_no_sense_are_errors(overrides, message):
    with pytest.raises(specs.SpecError, match=message):
        optimizer.make_optimizer(specs.OptimizerSpec(overrides=overrides), {"x": "a"}, {}, 10)


def test_state_is_sharded_like_its_parameters():
    """Adafactor's rows and columns lose one dimension of the spec; square matrices too; scalars are replicated."""
    P = jax.sharding.PartitionSpec
    shapes = {"layers/mlp/kernel": (2, 128, 256), "square": (128, 128), "bias": (128,)}
    params = trees.nest({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()})
    param_specs = {"layers/mlp/kernel": P(None, "fsdp", "tensor"), "square": P("fsdp", "tensor"), "bias": P("tensor")}
    axes = {"layers/mlp/kernel": ("layers", "embed", "mlp"), "square": ("embed", "mlp"), "bias": ("mlp",)}
    spec = specs.OptimizerSpec(name="adafactor")
    tx = optimizer.make_optimizer(spec, jax.tree.map(lambda _: "all", params), axes, 10)
    state = jax.eval_shape(tx.init, params)
    found = sharding.optimizer_specs(state, params, param_specs)

    def of(*parts):
        names = [n for n in found if all(f"/{part}/" in f"/{n}/" for part in parts)]
        assert len(names) == 1, names
        return found[names[0]]

    momentum = [n for n in found if n.endswith("ema/layers/mlp/kernel")]
    assert [found[n] for n in momentum] == [P(None, "fsdp", "tensor")]
    assert of("v_row", "layers/mlp/kernel") == P(None, "fsdp")  # the mean over the larger dimension, 256
    assert of("v_col", "layers/mlp/kernel") == P(None, "tensor")
    assert of("v_row", "square") == P("fsdp")
    assert of("v_col", "square") == P("tensor")
    assert of("v", "bias") == P("tensor")
    assert of("v", "layers/mlp/kernel") == P()  # a placeholder
    assert all(found[n] == P() for n in found if n.endswith("count"))
    fitting = trees.named_leaves(state)
    mesh = sharding.make_mesh(specs.MeshSpec(1, 2, 4))
    for name, leaf in fitting.items():
        jax.sharding.NamedSharding(mesh, found[name]).shard_shape(leaf.shape)
