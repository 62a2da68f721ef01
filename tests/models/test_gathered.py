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


def test_gradients_are_those_of_one_device():
    boxes = DENSE.init(jax.random.key(0), X)["params"]
    params = sharding.unbox(boxes)
    expected = jax.grad(loss)(params, X)["kernel"]
    mesh_spec = specs.MeshSpec(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(mesh_spec)
    placed = jax.device_put(params, sharding.shardings(params, sharding.param_specs(boxes, specs.RULES, mesh), mesh))
    program = lowered(mesh_spec, placed)
    found = program.compile()(placed, X)["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor"), "a gradient lies as its kernel does"


def test_on_one_device_nothing_is_said_about_layout():
    params = sharding.unbox(DENSE.init(jax.random.key(0), X)["params"])
    assert "sharding_constraint" not in lowered(specs.MeshSpec(1, 1, 1), params).as_text()


def test_what_is_awaited_changes_no_gradient_and_orders_the_backward_pass():
    """On a mesh a layer's attention waits, backward, for the gradients of its MLP's kernels."""
    layer = transformer.Layer(heads=2, mlp_width=32, depth=1, cross=True, dtype=jnp.dtype("float32"))
    keys, mask = jnp.ones((8, 5, 2, 8)), jnp.ones((8, 5), bool)

    def loss(params, x):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x, keys, keys, mask, True)[0]))

    boxes = layer.init(jax.random.key(0), X, keys, keys, mask, True)["params"]
    params = sharding.unbox(boxes)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    assert "optimization_barrier" not in gradients.lower(params, X).as_text(), "one device has nothing to wait for"
    mesh = sharding.make_mesh(specs.MeshSpec(data=2, fsdp=4))
    placed = jax.device_put(params, sharding.shardings(params, sharding.param_specs(boxes, specs.RULES, mesh), mesh))
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

    placed = jax.device_put(params, sharding.shardings(params, sharding.param_specs(boxes, rules, mesh), mesh))
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
