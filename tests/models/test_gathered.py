"""Kernels that are stored split over the mesh are gathered to be multiplied, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax import specs
from muse_jax.models import axes, layers, t5, transformer
from muse_jax.training import sharding

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 16)), jnp.float32)
DENSE = layers.Dense(24, (axes.EMBED, axes.MLP), dtype=jnp.dtype("float32"))


def loss(params, x):
    return jnp.sum(jnp.sin(DENSE.apply({"params": params}, x)))


def lowered(mesh_spec, params):
    mesh = sharding.make_mesh(mesh_spec)
    with sharding.layout(mesh, specs.RULES):
        return jax.jit(jax.grad(loss)).lower(params, X)


def in_shards(boxes, rules, mesh):
    """The parameters in their shards."""
    params = sharding.unbox(boxes)
    return jax.device_put(params, sharding.shardings(params, sharding.param_specs(boxes, rules, mesh), mesh))


def test_gradients_are_those_of_one_device():
    boxes = DENSE.init(jax.random.key(0), X)["params"]
    params = sharding.unbox(boxes)
    expected = jax.grad(loss)(params, X)["kernel"]
    mesh_spec = specs.MeshSpec(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(mesh_spec)
    placed = in_shards(boxes, specs.RULES, mesh)
    program = lowered(mesh_spec, placed)
    found = program.compile()(placed, X)["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor"), "a gradient lies as its kernel does"


def test_a_gradient_lies_as_its_kernel_does_where_two_axes_claim_the_same_devices():
    """Of a mesh axis that both of a kernel's axes are mapped to, the first has it, for kernels and gradients alike."""
    names = (axes.MLP, axes.EMBED)
    boxes = layers.Dense(16, names, dtype=jnp.dtype("float32")).init(jax.random.key(0), jnp.ones((8, 24)))["params"]
    rules, mesh = {**specs.RULES, "mlp": "fsdp"}, sharding.make_mesh(specs.MeshSpec(data=2, fsdp=4))
    (stored,) = sharding.param_specs(boxes, rules, mesh).values()
    assert stored == jax.sharding.PartitionSpec("fsdp")
    params = in_shards(boxes, rules, mesh)

    def loss(params, x):
        kernel = layers.gathered(params["kernel"], names, jnp.float32)
        return jnp.sum(jnp.sin(x @ kernel))

    with sharding.layout(mesh, rules):
        x = jax.device_put(jnp.ones((8, 24)), sharding.batch_sharding(mesh, rules))
        found = jax.jit(jax.grad(loss))(params, x)["kernel"]
    assert found.sharding.spec == stored


@pytest.mark.parametrize(("remat", "fsdp"), [("none", 4), ("full", 4), ("none", 1)])
@pytest.mark.parametrize("cross", [True, False])
def test_a_layers_first_kernels_are_gathered_in_the_layer_before(remat, fsdp, cross):
    """In one exchange, to the values and gradients of one device; not where kernels are to be gathered again."""
    stack = transformer.Stack(depth=3, heads=2, mlp_width=32, remat=remat, dtype=jnp.dtype("float32"))
    keys = jnp.asarray(np.random.default_rng(3).normal(size=(3, 8, 5, 2, 8)), jnp.float32)
    memory = transformer.Memory(keys, keys[::-1], jnp.ones((8, 5), bool)) if cross else None

    def loss(params, x):
        return jnp.sum(jnp.sin(stack.apply({"params": params}, x, memory)))

    boxes = stack.init(jax.random.key(0), X, memory)["params"]
    params = sharding.unbox(boxes)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)
    mesh = sharding.make_mesh(specs.MeshSpec(data=8 // fsdp, fsdp=fsdp))
    placed = in_shards(boxes, specs.RULES, mesh)
    with sharding.layout(mesh, specs.RULES):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(placed, X)
    program = lowered.compile()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), program(placed, X), expected)
    in_loops = [line for line in program.as_text().splitlines() if " all-gather(" in line and "/while/body" in line]
    together = [line for line in in_loops if " f32[3,16,2,8]" in line]
    alone = [line for line in in_loops if " f32[16,2,8]" in line or " f32[1,16,2,8]" in line]
    # Cross-attention has a query too.
    expected = {("none", 4): (1, cross), ("full", 4): (0, 2 * (3 + cross)), ("none", 1): (0, 0)}[remat, fsdp]
    assert (len(together), len(alone)) == expected, "forward, or forward and backward"
    assert ("f32[3,3,16,2,8]" in lowered.as_text("hlo")) == (expected[0] == 1), "nothing is carried for nothing"


def test_lookups_exchange_what_was_found_and_not_the_table():
    """Forward, and backward the gradients: no device has the whole width of the table."""
    table = jnp.asarray(np.random.default_rng(4).normal(size=(40, 16)), jnp.float32)
    ids = jnp.asarray(np.random.default_rng(5).integers(0, 40, (8, 6)), jnp.int32).at[:, 0].set(7)

    def loss(table, ids):
        return jnp.sum(jnp.sin(layers.looked_up(table, ids, axes.EMBED)))

    expected = jax.value_and_grad(loss)(table, ids)
    mesh = sharding.make_mesh(specs.MeshSpec(data=2, fsdp=4))
    placed = jax.device_put(table, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp")))
    with sharding.layout(mesh, specs.RULES):
        batch = jax.device_put(ids, sharding.batch_sharding(mesh, specs.RULES))
        program = jax.jit(jax.value_and_grad(loss)).lower(placed, batch).compile()
    found = program(placed, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert "[40,16]" not in program.as_text()


def test_on_one_device_nothing_is_said_about_layout():
    params = sharding.unbox(DENSE.init(jax.random.key(0), X)["params"])
    assert "sharding_constraint" not in lowered(specs.MeshSpec(1, 1, 1), params).as_text()


def test_what_is_awaited_changes_no_gradient_and_orders_the_backward_pass():
    """On a mesh a layer's attention waits, backward, for the gradients of its MLP's kernels."""
    layer = transformer.Layer(heads=2, mlp_width=32, depth=1, cross=True, dtype=jnp.dtype("float32"))
    keys, mask = jnp.ones((8, 5, 2, 8)), jnp.ones((8, 5), bool)

    def loss(params, x):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, (x, None), keys, keys, None, mask, True)[0][0]))

    boxes = layer.init(jax.random.key(0), (X, None), keys, keys, None, mask, True)["params"]
    params = sharding.unbox(boxes)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    assert "optimization_barrier" not in gradients.lower(params, X).as_text(), "one device has nothing to wait for"
    mesh = sharding.make_mesh(specs.MeshSpec(data=2, fsdp=4))
    placed = in_shards(boxes, specs.RULES, mesh)
    with sharding.layout(mesh, specs.RULES):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(placed, X)
    assert program.as_text().count("optimization_barrier") == 3, "two kernels, and what comes before the MLP"
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5),
        program.compile()(placed, X),
        gradients(params, X),
    )


@pytest.mark.parametrize("own", [{}, {"residual": ("fsdp", "data")}, {"residual": ("fsdp", "data"), "heads": None}])
def test_a_frozen_encoder_multiplies_its_kernels_where_they_lie(own):
    """With rules of its own that split kernels over `data`, and examples not: nothing is gathered but activations."""
    encoder = t5.T5Encoder(vocabulary_size=12, layers=2, width=16, heads=4, head_dim=6, mlp_width=40)
    ids = jnp.asarray(np.random.default_rng(1).integers(1, 12, (8, 5)), jnp.int32)
    mask = ids > 2
    boxes = encoder.init(jax.random.key(0), ids, mask)["params"]
    params = sharding.unbox(boxes)
    rules = {**specs.RULES, "batch": ("fsdp",), "embed": None, "mlp": "data", "heads": "data", "vocab": None, **own}
    mesh = sharding.make_mesh(specs.MeshSpec(data=2, fsdp=4))

    def embed(params, ids, mask):
        with layers.ruled(rules):
            return encoder.apply({"params": params}, ids, mask)

    placed = in_shards(boxes, rules, mesh)
    batch = jax.device_put((ids, mask), sharding.batch_sharding(mesh, specs.RULES))
    with sharding.layout(mesh, specs.RULES):
        program = jax.jit(embed).lower(placed, *batch).compile()
    np.testing.assert_allclose(program(placed, *batch), jax.jit(embed)(params, ids, mask), atol=1e-5)
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    kernels = ("16,40", "40,16", "16,24", "24,16")
    assert not [line for line in gathered if any(f"[{shape}]" in line for shape in kernels)]
    assert "all-reduce(" in program.as_text(), "the parts of the products are added up"
    stream = "f32[1,5,16]" if own else "f32[2,5,16]"
    assert stream in program.as_text(), "between products each device has its own of the examples"


@pytest.mark.parametrize("heads", ["data", None])
def test_a_deep_frozen_encoder_in_bfloat16_stays_near_float32_where_parts_are_summed_in_bfloat16(heads):
    """At the bound that one device is held to (tests/interop/test_t5_hf.py), on prompts and on an end token alone."""
    sizes = dict(vocabulary_size=40, layers=24, width=64, heads=4, head_dim=16, mlp_width=128)
    ids = jnp.asarray(np.random.default_rng(6).integers(2, 40, (8, 12)), jnp.int32).at[0].set(0).at[0, 0].set(1)
    mask = (ids > 0).at[1, 7:].set(False)
    boxes = t5.T5Encoder(**sizes).init(jax.random.key(0), ids, mask)["params"]
    params = sharding.unbox(boxes)
    expected = np.asarray(jax.jit(t5.T5Encoder(**sizes).apply)({"params": params}, ids, mask))
    own = {
        "batch": ("fsdp",),
        "residual": ("fsdp", "data"),
        "embed": None,
        "mlp": "data",
        "heads": heads,
        "vocab": None,
    }
    rules, mesh = {**specs.RULES, **own}, sharding.make_mesh(specs.MeshSpec(data=4, fsdp=2))

    def embed(params, ids, mask):
        with layers.ruled(rules):
            return t5.T5Encoder(**sizes, dtype="bfloat16").apply({"params": params}, ids, mask)

    placed = in_shards(boxes, rules, mesh)
    batch = jax.device_put((ids, mask), sharding.batch_sharding(mesh, specs.RULES))
    with sharding.layout(mesh, specs.RULES):
        lowered = jax.jit(embed).lower(placed, *batch)
    found = np.asarray(lowered.compile()(placed, *batch))
    for name, rows in {"all": slice(None), "empty": slice(0, 1)}.items():
        error = np.linalg.norm(found[rows] - expected[rows]) / np.linalg.norm(expected[rows])
        print(f"heads {heads}, {name}: relative error {error:.4f}")
        assert error < 0.02
