"""FLOPs of the networks, counted in their traced forward passes.

2 m n k for a product [m, k] x [k, n] and 2 h w c d k^2 for a convolution of k x k pixels from c to d
channels with an h x w output, also where fewer do (`vqgan.upsampled_convolution`); norms, softmax,
activations, look-ups, and anything that is computed a second time count nothing.

A train step is three forward passes of what is trained (one forward, two backward: by the inputs and
by the kernels), one of what is only read, and seven of a discriminator (on the reconstruction:
forward, by its input for the generator, by inputs and kernels for itself; on the picture: forward, by
inputs and kernels). Of LPIPS it is one and a half times what a pair of pictures takes: forward on both,
and by the reconstruction's pixels.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from muse_jax import specs
from muse_jax.models import lpips, predictors, t5, vqgan
from muse_jax.models.discriminator import Discriminator


def count(function: Callable, *args: Any) -> float:
    """FLOPs of the products and convolutions in a function of arrays (or their shapes).

    >>> count(lambda a, b: jnp.sin(a @ b), jnp.zeros((3, 4)), jnp.zeros((4, 5)))
    120.0
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * equation.outvars[0].aval.size * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / features
        elif params.get("name") == vqgan.upsampled_convolution.__name__:
            total += 2.0 * equation.outvars[0].aval.size * math.prod(equation.invars[1].aval.shape[:-1])
        else:
            inner = [_of_jaxpr(getattr(x, "jaxpr", x)) for x in jax.tree.leaves(list(params.values())) if _is_jaxpr(x)]
            # Of branches the dearest; everything else is done once, or `length` times by a scan.
            total += max(inner, default=0.0) if name == "cond" else params.get("length", 1) * sum(inner)
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def train(spec: specs.Spec, tokenizers: Mapping[str, specs.VQGANSpec]) -> float:
    """Of the networks in one train step; see the top of this file.

    Args:
      tokenizers: of the paths in task.tokenizer and task.low_tokenizer.

    Raises:
      NotImplementedError: for a model whose step isn't counted here.
    """
    images = jax.ShapeDtypeStruct((spec.train.batch_size, spec.data.image_size, spec.data.image_size, 3), jnp.float32)
    if isinstance(spec.model, specs.VQGANSpec):
        encoder = encode(spec.model, images)
        whole = forward(vqgan.VQGAN(spec.model), images)
        total = 3 * whole - (2 * encoder if spec.task.trainable == "decoder" else 0)
        if spec.task.adversarial:
            model = spec.model
            judge = Discriminator(model.discriminator_channels, model.discriminator_layers, model.dtype)
            total += 7 * forward(judge, images)
        if spec.task.perceptual:
            total += perceptual(images)
        return total
    if not isinstance(spec.model, specs.BaseSpec | specs.SuperResSpec | specs.MaskGITSpec | specs.PaellaSpec):
        raise NotImplementedError(f"the FLOPs of a train step of {type(spec.model).__name__}.")
    total = 3 * transformer(spec.model, spec.train.batch_size, spec.condition_length)
    encoder = getattr(spec.model, "text", None)
    if encoder is not None and not encoder.trainable:
        once = not spec.data.text_embeddings
        total -= (3 - once) * text(encoder, spec.train.batch_size, spec.data.text_length)
    if specs.is_precomputed(spec.data):
        return total
    tokenizer = tokenizers[spec.task.tokenizer]
    total += encode(tokenizer, images)
    if spec.task.low_tokenizer:
        low = tokenizers[spec.task.low_tokenizer]
        shape = (images.shape[0], *(side * low.factor for side in spec.model.low_grid), 3)
        total += encode(low, jax.ShapeDtypeStruct(shape, jnp.float32))
    return total


def forward(module: Any, *args: Any, method: str | None = None) -> float:
    """Of one call of a Flax module."""
    variables = jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *args)
    return count(functools.partial(module.apply, method=method), variables, *args)


def encode(tokenizer: specs.VQGANSpec, images: Any) -> float:
    """Of pictures to token ids."""
    return forward(vqgan.VQGAN(tokenizer), images, method="tokens")


def perceptual(images: Any) -> float:
    """Of LPIPS between two batches of pictures, and its gradient by one of them."""
    return 1.5 * forward(lpips.LPIPS(), images, images)


def text(encoder: specs.TextEncoderSpec, batch: int, length: int) -> float:
    """Of text ids to embeddings."""
    ids, mask = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, bool))
    return forward(t5.from_spec(encoder), ids, mask)


def transformer(model: Any, batch: int, text_length: int) -> float:
    """Of text ids (of a class: one) and tokens to logits, by a transformer or by Paella's U-Net."""
    places = [model.grid[0] * model.grid[1]]
    if isinstance(model, specs.SuperResSpec):
        places.append(model.low_grid[0] * model.low_grid[1])
    tokens, *low = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in places)
    text = jax.ShapeDtypeStruct((batch, text_length), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, text_length), bool)
    return forward(predictors.from_spec(model), tokens, text, mask, *low)
