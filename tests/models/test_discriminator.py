"""The discriminator: a map of local judgments that no other picture influences."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax.models import axes
from muse_jax.models.discriminator import Discriminator

SMALL = Discriminator(channels=4, layers=2)


@pytest.fixture(scope="module")
def params():
    shapes = nn.unbox(jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def judge():
    return jax.jit(lambda params, images: SMALL.apply({"params": params}, images))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)


def reference(params, x):
    """One picture through convolutions (stride 2, 2, 1, 1), group norm and leaky ReLU."""
    for i, stride in enumerate((2, 2, 1, 1)):
        kernel = params[f"conv_{i}"]["kernel"]
        x = np.pad(x, [(1, 1), (1, 1), (0, 0)] if stride == 2 else [(1, 2), (1, 2), (0, 0)])
        h, w = (x.shape[0] - 4) // stride + 1, (x.shape[1] - 4) // stride + 1
        x = np.array(
            [
                [np.tensordot(x[r * stride : r * stride + 4, c * stride : c * stride + 4], kernel, 3) for c in range(w)]
                for r in range(h)
            ]
        ) + params[f"conv_{i}"].get("bias", 0)
        if i in (1, 2):  # fewer than 32 channels: each is a group
            norm = params[f"norm_{i}"]
            x = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-6) * norm["scale"] + norm["bias"]
        if i < 3:
            x = np.where(x > 0, x, 0.2 * x)
    return x[..., 0]


def test_equals_the_reference(judge, params, pictures):
    got = judge(params, pictures)
    assert got.shape == (3, 4, 6)
    np.testing.assert_allclose(got, [reference(params, x.astype(np.float64)) for x in pictures], atol=1e-4)


def test_a_picture_is_judged_alone(judge, params, pictures):
    alone = [judge(params, picture[None])[0] for picture in pictures]
    np.testing.assert_allclose(judge(params, pictures), alone, atol=1e-5)


def test_parameters_have_axes_and_the_widths_double():
    boxed = jax.eval_shape(Discriminator(channels=8, layers=5).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    kernels = [boxed["params"][f"conv_{i}"]["kernel"] for i in range(7)]
    spatial = (axes.ROWS, axes.COLUMNS, axes.CHANNELS_IN)
    assert all(k.names == (*spatial, axes.CHANNELS_OUT) for k in kernels[:-1])
    assert kernels[-1].names == (*spatial, None), "one logit can't be split"
    assert [k.value.shape[-1] for k in kernels] == [8, 16, 32, 64, 64, 64, 1]


def test_refuses_pictures_smaller_than_its_stride():
    with pytest.raises(ValueError, match="discriminator_layers"):
        jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 3, 16, 3)))


def test_bfloat16_gives_float32_logits(params, pictures, judge):
    got = Discriminator(channels=4, layers=2, dtype="bfloat16").apply({"params": params}, jnp.asarray(pictures))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, judge(params, pictures), atol=0.2)
