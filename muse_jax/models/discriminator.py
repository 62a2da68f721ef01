"""PatchGAN discriminator: judges every patch of a picture by itself (Isola et al. 2017).

The adversary of the VQGAN (Esser et al. 2021; Muse, section 2.2).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from muse_jax.models import axes


class Discriminator(nn.Module):
    """Fully convolutional: any picture -> a map of logits, one for each overlapping patch.

    `layers` 4x4 convolutions of stride 2 that double the channels (up to 8 times the first), one of
    stride 1, and one to a single logit; with 3 layers a logit sees 70x70 pixels.

    Differs from the paper: group normalization instead of batch normalization, so that a picture's
    logits depend neither on the others in its batch (real and reconstructed ones would be told
    apart by their batch's statistics) nor on how the batch is cut over devices and micro-batches,
    and there are no running averages to keep. And every convolution pads to keep
    ``ceil(side / stride)``, so that small pictures work.

    Attributes:
      channels: of the first convolution.
      layers: convolutions of stride 2; the map's sides are the picture's divided by 2 ** layers.
      dtype: of the convolutions.
    """

    channels: int = 64
    layers: int = 3
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b i j"]:
        """Logits of pictures in [-1, 1], high for what looks real; float32."""
        if min(images.shape[1:3]) < 2**self.layers:
            raise ValueError(
                f"the discriminator's {self.layers} layers halve the sides of pictures of shape {images.shape} to "
                "nothing; use fewer layers (model.discriminator_layers)."
            )
        x = images.astype(self.dtype)
        for i in range(self.layers + 1):
            width = self.channels * 2 ** min(i, 3)
            stride = 2 if i < self.layers else 1
            x = self._convolution(width, stride, use_bias=i == 0, name=f"conv_{i}")(x)
            if i > 0:
                x = self._normalization(width, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        logits = self._convolution(1, 1, use_bias=True, name=f"conv_{self.layers + 1}")(x)
        return logits[..., 0].astype(jnp.float32)

    def _convolution(self, features: int, stride: int, use_bias: bool, name: str) -> nn.Conv:
        out = axes.CHANNELS_OUT if features > 1 else None  # one logit can't be split
        names = (axes.ROWS, axes.COLUMNS, axes.CHANNELS_IN, out)
        return nn.Conv(
            features,
            (4, 4),
            strides=(stride, stride),
            use_bias=use_bias,
            dtype=jnp.dtype(self.dtype),
            # Isola et al., section 3.3.
            kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), names),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (out,)),
            name=name,
        )

    def _normalization(self, features: int, name: str) -> nn.GroupNorm:
        return nn.GroupNorm(
            num_groups=None,
            group_size=max(1, features // 32),
            dtype=jnp.dtype(self.dtype),
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, (axes.CHANNELS_OUT,)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes.CHANNELS_OUT,)),
            name=name,
        )
