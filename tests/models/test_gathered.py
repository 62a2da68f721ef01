"""Kernels that are stored split over the mesh are gathered to be multiplied, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np

from muse_jax import specs
from muse_jax.models import axes, layers
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
