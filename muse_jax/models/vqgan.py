"""VQGAN (Esser et al. 2021), fully convolutional as Muse has it (section 2.2 and appendix A.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muse_jax.models import axes, layers, quantizer


class Conv(nn.Module):
    """Square convolution with bias, padding "SAME"."""

    features: int
    size: int = 3
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    name_of_features: str | None = axes.CHANNELS_OUT  # None: too few to be split
    upsampled: bool = False  # of the input made twice as large; size 3, stride 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        names = (axes.ROWS, axes.COLUMNS, axes.CHANNELS_IN, self.name_of_features)
        return nn.Conv(
            self.features,
            (self.size, self.size),
            (self.stride, self.stride),
            dtype=self.dtype,
            kernel_init=layers.kernel_init(names, (0, 1, 2)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (self.name_of_features,)),
            conv_general_dilated=_upsampled if self.upsampled else None,
            name="conv",
        )(x)


def _upsampled(x: Array, kernel: Array, *strides_and_padding: Any, **others: Any) -> Array:
    return upsampled_convolution(x, kernel)


@jax.jit
def upsampled_convolution(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h2 w2 o"]:
    """3x3 convolution, padding "SAME", of the input made twice as large by repeating every pixel.

    Of the 3 x 3 pixels that a pixel of the result looks at, those that are copies of one share a product with
    the sum of their weights: 2 x 2 are left, other sums for even and odd rows and columns. On CPU four such
    convolutions take about half of the time of the plain one. `flops.count` counts the plain one.
    """
    kernels = [_sums_of_neighbours(rows, 1) for rows in _sums_of_neighbours(kernel.astype(jnp.float32), 0)]

    def part(row: int, column: int) -> Float[Array, "b h w o"]:
        return jax.lax.conv_general_dilated(
            x,
            kernels[row][column].astype(kernel.dtype),
            window_strides=(1, 1),
            padding=((1 - row, row), (1 - column, column)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    parts = jnp.stack([jnp.stack([part(row, column) for column in range(2)], axis=3) for row in range(2)], axis=2)
    b, h, _, w, _, o = parts.shape
    return parts.reshape(b, 2 * h, 2 * w, o)


def _sums_of_neighbours(kernel: Float[Array, "*k"], axis: int) -> tuple[Array, Array]:
    """Three weights of which the last two fall on one pixel, at even places, or the first two, at odd ones."""
    first, middle, last = jnp.split(kernel, 3, axis)
    return jnp.concatenate([first, middle + last], axis), jnp.concatenate([first + middle, last], axis)


class Norm(nn.Module):
    """GroupNorm of 32 groups, or LayerNorm of each position by itself."""

    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        inits = dict(
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, (axes.CHANNELS_OUT,)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes.CHANNELS_OUT,)),
        )
        if self.kind == "layer":
            return nn.LayerNorm(**inits, name="norm")(x).astype(x.dtype)
        return nn.GroupNorm(min(32, x.shape[-1]), **inits, name="norm")(x).astype(x.dtype)


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice; added to the input (projected when the channels change)."""

    channels: int
    size: int
    norm: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        y = Conv(self.channels, self.size, dtype=self.dtype, name="conv1")(nn.swish(Norm(self.norm, name="norm1")(x)))
        y = Conv(self.channels, self.size, dtype=self.dtype, name="conv2")(nn.swish(Norm(self.norm, name="norm2")(y)))
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, 1, dtype=self.dtype, name="shortcut")(x)
        return x + y


def space_to_depth(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """Each patch x patch square of pixels becomes the channels of one position."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).swapaxes(2, 3)
    return x.reshape(b, h * patch, w * patch, c // patch**2)


class Encoder(nn.Module):
    """Pixels in [-1, 1] to latents."""

    spec: Any

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 d"]:
        s, dtype = self.spec, jnp.dtype(self.spec.dtype)
        x = space_to_depth(images, s.stem_patch) if s.stem_patch > 1 else images
        x = Conv(s.channels * s.channel_multipliers[0], s.encoder_kernel, dtype=dtype, name="stem")(x)
        for level, multiplier in enumerate(s.channel_multipliers):
            if level:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for i in range(s.res_blocks):
                name = f"level{level}_block{i}"
                x = ResBlock(s.channels * multiplier, s.encoder_kernel, s.normalization, dtype, name=name)(x)
        x = nn.swish(Norm(s.normalization, name="norm")(x))
        return Conv(s.code_dim, 1, dtype=dtype, name_of_features=axes.CODE, name="latents")(x)


class Decoder(nn.Module):
    """Codes to pixels, about [-1, 1]."""

    spec: Any

    @nn.compact
    def __call__(self, codes: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 3"]:
        s, dtype = self.spec, jnp.dtype(self.spec.dtype)
        channels = s.decoder_channels or s.channels
        blocks = s.decoder_res_blocks or s.res_blocks
        levels = list(enumerate(s.channel_multipliers))[::-1]
        x = Conv(channels * s.channel_multipliers[-1], dtype=dtype, name="stem")(codes.astype(dtype))
        for level, multiplier in levels:
            for i in range(blocks):
                name = f"level{level}_block{i}"
                x = ResBlock(channels * multiplier, 3, s.normalization, dtype, name=name)(x)
            if level:
                x = Conv(x.shape[-1], dtype=dtype, upsampled=True, name=f"level{level}_up")(x)
        x = nn.swish(Norm(s.normalization, name="norm")(x))
        x = Conv(3 * s.stem_patch**2, dtype=dtype, name_of_features=None, name="pixels")(x).astype(jnp.float32)
        return depth_to_space(x, s.stem_patch) if s.stem_patch > 1 else x


class VQGAN(nn.Module):
    """Encoder, codebook and decoder of a `VQGANSpec`; any height and width that `factor` divides."""

    spec: Any

    def setup(self):
        s = self.spec
        self.encoder = Encoder(s)
        self.quantizer = quantizer.Quantizer(s.codebook_size, s.code_dim, s.normalize_codes)
        self.decoder = Decoder(s)

    def encode(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 d"]:
        """Latents before quantization; images in [-1, 1]."""
        return self.encoder(images)

    def tokens(self, images: Float[Array, "b h w 3"]) -> Int[Array, "b h2 w2"]:
        """Token ids; images in [-1, 1]."""
        return self.quantizer(self.encoder(images)).ids

    def decode(self, codes: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 3"]:
        """Codes to images, about [-1, 1]."""
        return self.decoder(codes)

    def decode_tokens(self, ids: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 3"]:
        """Token ids to images, about [-1, 1]."""
        return self.decoder(self.quantizer.lookup(ids))

    def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b h w 3"], quantizer.Quantized]:
        """Reconstruction and what the quantizer did."""
        quantized = self.quantizer(self.encoder(images))
        return self.decoder(quantized.codes), quantized


def to_unit(images: Array) -> Float[Array, "*b"]:
    """uint8 pixels to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "*b"]) -> Array:
    """[-1, 1] to uint8 pixels, clipped and rounded."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
