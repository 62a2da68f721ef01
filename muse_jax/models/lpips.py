"""LPIPS: how different two pictures look, from the features of a VGG16 (Zhang et al. 2018).

The perceptual loss of the VQGAN (Esser et al. 2021; Muse, appendix A.2, weight 0.05). This is the
architecture only; its weights are read from a file and never fetched.

The file is a safetensors file of float tensors with these names (kernels are [height, width, in,
out]):

    features/conv{stage}_{i}/kernel  [3, 3, in, out]   VGG16's convolutions: stages 1 and 2 have two
    features/conv{stage}_{i}/bias    [out]             of them, stages 3, 4 and 5 three
    linear/relu{stage}_{last}        [channels]        LPIPS' weights of each channel, never negative
"""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load

from muse_jax.models import axes

# Channels of the convolutions of VGG16's five stages; a stage ends before the next one's 2x2 pooling.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# LPIPS' normalisation of pictures in [-1, 1]: ImageNet's mean and deviation, to three digits.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)


class _VGG16(nn.Module):
    """Outputs of relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Array]:
        outputs = {}
        for stage, widths in enumerate(STAGES, start=1):
            if stage > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i, width in enumerate(widths, start=1):
                conv = nn.Conv(
                    width,
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    dtype=self.dtype,
                    kernel_init=nn.with_logical_partitioning(
                        nn.initializers.he_normal(), (axes.ROWS, axes.COLUMNS, axes.CHANNELS_IN, axes.CHANNELS_OUT)
                    ),
                    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes.CHANNELS_OUT,)),
                    name=f"conv{stage}_{i}",
                )
                x = nn.relu(conv(x))
            outputs[f"relu{stage}_{len(widths)}"] = x
        return outputs


class _Linear(nn.Module):
    """One non-negative weight a channel and layer, as LPIPS learned them from people's judgments."""

    @nn.compact
    def __call__(self, differences: dict[str, Array]) -> Float[Array, " b"]:
        init = nn.with_logical_partitioning(nn.initializers.constant(1.0), (axes.CHANNELS_OUT,))
        total = jnp.zeros(())
        for name, difference in differences.items():
            weights = self.param(name, init, difference.shape[-1:])
            total = total + jnp.mean(difference @ weights, axis=(1, 2))
        return total


class LPIPS(nn.Module):
    """The distance of each pair of pictures, 0 for equal ones (Zhang et al. 2018, equation 1).

    Attributes:
      dtype: of the convolutions; features are compared in float32.
    """

    dtype: Any = "float32"

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], others: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Distances of pictures in [-1, 1], at least 16 pixels a side; float32."""
        if images.shape != others.shape or images.shape[-1] != 3 or min(images.shape[1:3]) < SMALLEST_SIDE:
            raise ValueError(
                f"LPIPS got pictures of shapes {images.shape} and {others.shape}; it needs two equal shapes "
                f"[batch, height, width, 3] with sides of at least {SMALLEST_SIDE}."
            )
        # One pass over both batches: twice the work of each product instead of twice the products.
        both = (jnp.concatenate([images, others]) - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        features = _VGG16(jnp.dtype(self.dtype), name="features")(both.astype(self.dtype))
        differences = {}
        for name, feature in features.items():
            first, second = jnp.split(_unit(feature.astype(jnp.float32)), 2)
            differences[name] = jnp.square(first - second)
        return _Linear(name="linear")(differences)


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each position's channels divided by their length; 0, with gradient 0, where all are 0.

    Differs from the original: x / (|x| + 1e-10), whose gradient is NaN where ReLU left nothing.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, x / (length + 1e-10), 0.0)


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Name in the weights file -> shape."""
    image = jax.ShapeDtypeStruct((1, SMALLEST_SIDE, SMALLEST_SIDE, 3), jnp.float32)
    params = nn.unbox(jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"])
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def load_lpips(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters of `LPIPS` as a nested dict of float32 NumPy arrays.

    Args:
      path: a safetensors file, or the folder that import_weights wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file; or a tensor, which the message names, is missing, unknown, or
        of the wrong shape, or has values that LPIPS cannot have.
    """
    file, path = epath.Path(path), os.fspath(path)
    if file.is_dir():
        file, path = file / "params.safetensors", os.path.join(path, "params.safetensors")
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no LPIPS weights file {path!r}. Give a file or a folder that import_weights wrote, or train "
            "without the perceptual loss."
        )
    try:
        tensors = {name: np.asarray(value, np.float32) for name, value in load(file.read_bytes()).items()}
    except SafetensorError as error:
        raise ValueError(f"LPIPS weights {path!r} are damaged or no safetensors file: {error}.") from error
    shapes = parameter_shapes()
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"LPIPS weights {path!r} lack {', '.join(missing)}.")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"LPIPS weights {path!r} have tensors that LPIPS does not: {', '.join(unknown)}.")
    for name, shape in shapes.items():
        value = tensors[name]
        if value.shape != shape:
            raise ValueError(f"LPIPS weights {path!r}: {name} has shape {value.shape}; expected {shape}.")
        if not np.isfinite(value).all() or (name.startswith("linear/") and (value < 0).any()):
            raise ValueError(f"LPIPS weights {path!r}: {name} has values that are not finite or, in linear/, negative.")
    return traverse_util.unflatten_dict(tensors, sep="/")
