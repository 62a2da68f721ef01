"""Vector quantization: the nearest code, straight-through gradients, and the revival of dead codes."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from muse_jax.models import axes


class Quantized(NamedTuple):
    """codes: the chosen codes with the latents' gradient; ids; the two losses of every place."""

    latents: jax.Array  # [..., d]: what was compared with the codes
    codes: jax.Array  # [..., d]
    ids: jax.Array  # [...]
    codebook_loss: jax.Array  # [...]: moves codes to latents
    commitment_loss: jax.Array  # [...]: moves latents to codes


def normalized(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x on the unit sphere."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def nearest(latents: Float[Array, "*b d"], codebook: Float[Array, "k d"]) -> Int[Array, "*b"]:
    """Index of the code at the least Euclidean distance; the lowest index among equals."""
    distance = jnp.sum(jnp.square(codebook), axis=-1) - 2 * jnp.dot(latents, codebook.T)
    # Not argmin, which XLA's CPU backend takes six times as long for as for two reductions of one value each.
    least = jnp.min(distance, axis=-1, keepdims=True)
    indices = jnp.arange(codebook.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(distance > least, codebook.shape[0], indices), axis=-1)


def quantize(latents: Float[Array, "*b d"], codebook: Float[Array, "k d"]) -> Quantized:
    """VQ-VAE's quantization (van den Oord et al. 2017, section 3.2)."""
    ids = nearest(latents, codebook)
    codes = codebook[ids]
    codebook_loss = jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - codes), axis=-1)
    commitment_loss = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(codes)), axis=-1)
    straight_through = latents + jax.lax.stop_gradient(codes - latents)
    return Quantized(latents, straight_through, ids, codebook_loss, commitment_loss)


class Quantizer(nn.Module):
    """A codebook, l2-normalised or not, and how many steps each code has gone unused."""

    size: int
    dim: int
    normalize: bool

    def setup(self):
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=1, out_axis=0)
        names = (axes.VOCAB, axes.CODE)
        self.table = self.param("codebook", nn.with_logical_partitioning(init, names), (self.size, self.dim))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axes.VOCAB,))
        self.unused = self.param("unused", zeros, (self.size,))

    def codebook(self) -> Float[Array, "k d"]:
        """The codes as they are compared and looked up."""
        return normalized(self.table) if self.normalize else self.table

    def __call__(self, latents: Float[Array, "*b d"]) -> Quantized:
        latents = latents.astype(jnp.float32)
        return quantize(normalized(latents) if self.normalize else latents, self.codebook())

    def lookup(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """The codes of ids."""
        return self.codebook()[ids]


def revive(
    params: dict[str, Any], used: Int[Array, "k"], candidates: Float[Array, "m d"], after: int
) -> dict[str, jax.Array]:
    """Counts unused steps, and moves codes unused for `after` steps onto candidate latents.

    Args:
      params: the quantizer's {"codebook": [k, d], "unused": [k]}.
      used: how often each code was chosen in this step.
      candidates: latents where the reconstruction was worst, the worst first; at most m codes are
        revived in a step.

    Returns:
      The new params.
    """
    unused = jnp.where(used > 0, 0, params["unused"] + 1)
    dead = unused >= after
    rank = jnp.cumsum(dead) - 1
    chosen = dead & (rank < candidates.shape[0])
    replacement = candidates[jnp.clip(rank, 0, candidates.shape[0] - 1)]
    codebook = jnp.where(chosen[:, None], replacement, params["codebook"])
    return {"codebook": codebook, "unused": jnp.where(chosen, 0, unused)}
