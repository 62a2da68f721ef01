"""The VQGAN: fully convolutional, any factor, and what a token may see."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muse_jax import specs
from muse_jax.models import axes, vqgan

SMALL = specs.VQGANSpec(
    codebook_size=16, code_dim=4, channels=8, channel_multipliers=(1, 2), res_blocks=1, stem_patch=2
)


def arbitrary(spec):
    shapes = nn.unbox(jax.eval_shape(vqgan.VQGAN(spec).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, 3)), jnp.float32)


def run(spec, params, method, x):
    return jax.jit(lambda p, x: vqgan.VQGAN(spec).apply(p, x, method=method))(params, x)


@pytest.mark.parametrize(
    ("stem", "multipliers", "factor"), [(1, (1,), 1), (1, (1, 2, 2), 4), (4, (1,), 4), (2, (1, 2), 4)]
)
def test_the_factor_is_that_of_its_levels(stem, multipliers, factor):
    spec = dataclasses.replace(SMALL, stem_patch=stem, channel_multipliers=multipliers)
    assert spec.factor == factor
    model, image = vqgan.VQGAN(spec), jax.ShapeDtypeStruct((2, 8, 16, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    ids = jax.eval_shape(lambda p, x: model.apply(p, x, method="tokens"), params, image)
    assert ids.shape == (2, 8 // factor, 16 // factor)
    assert ids.dtype == jnp.int32
    back = jax.eval_shape(lambda p, x: model.apply(p, x, method="decode_tokens"), params, ids)
    assert back.shape == image.shape
    assert back.dtype == jnp.float32


def test_one_set_of_parameters_serves_any_size(images):
    params = arbitrary(SMALL)
    tall = jnp.swapaxes(images, 1, 2)
    assert run(SMALL, params, "tokens", images).shape == (2, 4, 6)
    assert run(SMALL, params, "tokens", tall).shape == (2, 6, 4)


def test_reconstruction_is_decoding_the_tokens(images):
    params = arbitrary(SMALL)
    output, quantized = run(SMALL, params, None, images)
    ids = run(SMALL, params, "tokens", images)
    np.testing.assert_array_equal(quantized.ids, ids)
    assert len(np.unique(ids)) > 3
    np.testing.assert_allclose(run(SMALL, params, "decode_tokens", ids), output, atol=1e-4)


@pytest.mark.parametrize("normalization", ["group", "layer"])
def test_a_picture_does_not_depend_on_its_batch(images, normalization):
    spec = dataclasses.replace(SMALL, normalization=normalization)
    params = arbitrary(spec)
    whole = run(spec, params, "encode", images)
    np.testing.assert_allclose(run(spec, params, "encode", images[1:]), whole[1:], atol=1e-5)


def test_a_token_of_an_encoder_with_kernel_1_sees_its_patch_alone(images):
    spec = dataclasses.replace(SMALL, stem_patch=4, channel_multipliers=(1,), encoder_kernel=1, normalization="layer")
    params = arbitrary(spec)
    latents = run(spec, params, "encode", images)
    other = run(spec, params, "encode", images.at[:, 4:8, 8:12].add(0.5))
    changed = np.abs(np.asarray(other - latents)).max((0, 3)) > 0
    expected = np.zeros_like(changed)
    expected[1, 2] = True
    np.testing.assert_array_equal(changed, expected)


def test_a_decoder_of_its_own_size_leaves_the_encoder(images):
    larger = dataclasses.replace(SMALL, decoder_channels=16, decoder_res_blocks=2)
    one, two = arbitrary(SMALL)["params"], arbitrary(larger)["params"]
    for name in ("encoder", "quantizer"):
        assert jax.tree.map(np.shape, one[name]) == jax.tree.map(np.shape, two[name])
    assert len(two["decoder"]) == len(one["decoder"]) + 2
    assert two["decoder"]["stem"]["conv"]["kernel"].shape == (3, 3, 4, 32)


def repeated_and_convolved(x, kernel):
    """In NumPy: every pixel four times, then the sum over a 3x3 window with zeros around."""
    x = np.pad(np.repeat(np.repeat(x, 2, axis=1), 2, axis=2), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return np.einsum("bhwirs,rsio->bhwo", windows, kernel)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 1, 3, 2)])
def test_upsampling_and_convolution_are_one(shape):
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(3, 3, shape[-1], 7)).astype(np.float32)
    expected = repeated_and_convolved(x, kernel)
    np.testing.assert_allclose(vqgan.upsampled_convolution(x, kernel), expected, atol=1e-5)
    half = vqgan.upsampled_convolution(jnp.bfloat16(x), jnp.bfloat16(kernel))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=0.03 * np.abs(expected).max())


def test_gradients_of_upsampling_and_convolution_are_those_of_the_two():
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(3, 3, 5, 6)).astype(np.float32)
    cotangent = rng.normal(size=(2, 6, 8, 6)).astype(np.float32)

    def plain(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = jax.vjp(vqgan.upsampled_convolution, x, kernel)[1](cotangent)
    for one, other in zip(found, jax.vjp(plain, x, kernel)[1](cotangent), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_gradients_pass_the_quantizer(images):
    params = arbitrary(SMALL)

    def loss(params):
        return jnp.mean(jnp.square(vqgan.VQGAN(SMALL).apply(params, images)[0] - images))

    gradients = jax.jit(jax.grad(loss))(params)["params"]
    assert np.abs(gradients["encoder"]["stem"]["conv"]["kernel"]).max() > 0
    np.testing.assert_array_equal(gradients["quantizer"]["codebook"], 0)  # only its loss moves it


def test_space_to_depth_keeps_each_square_together(images):
    patches = vqgan.space_to_depth(images, 4)
    np.testing.assert_array_equal(patches[1, 2, 3], images[1, 8:12, 12:16].reshape(-1))
    np.testing.assert_array_equal(vqgan.depth_to_space(patches, 4), images)


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    unit = vqgan.to_unit(pixels)
    assert (unit.min(), unit.max()) == (-1, 1)
    np.testing.assert_array_equal(vqgan.to_uint8(unit), pixels)
    np.testing.assert_array_equal(vqgan.to_uint8(jnp.array([-7.0, 1.2])), [0, 255])


def test_every_parameter_has_known_axes():
    boxed = jax.eval_shape(vqgan.VQGAN(SMALL).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    for path, box in jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim, path
        assert set(box.names) <= {*axes.ALL, None}, path  # None: too small to be split
