"""Muse's two token predictors: base (section 2.3) and super-resolution (section 2.4).

Both are called in three moves, so that a sampler can do the first two once for all its steps:
``encode_text`` (text to embeddings), ``condition`` (embeddings to the keys and values of every
layer), ``logits`` (tokens to logits). Calling the module does all three.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from muse_jax.models import axes, layers, t5, transformer


class TokenEmbedding(nn.Module):
    """Token embeddings plus learned 2D positions (a table of rows and one of columns)."""

    vocabulary: int
    grid: tuple[int, int]
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n i"]:
        normal = nn.initializers.normal(1.0)
        # Codes and the mask id are an odd number of rows, which no mesh axis divides: named as positions
        # are, tables that are split along the width only.
        table = self.param(
            "tokens", nn.with_logical_partitioning(normal, (axes.POSITIONS, axes.EMBED)), (self.vocabulary, self.width)
        )
        sides = [
            self.param(name, nn.with_logical_partitioning(normal, (axes.POSITIONS, axes.EMBED)), (side, self.width))
            for name, side in zip(("rows", "columns"), self.grid, strict=True)
        ]
        positions = (sides[0][:, None, :] + sides[1][None, :, :]).reshape(1, -1, self.width)
        return (layers.looked_up(table, tokens, axes.EMBED) + positions).astype(self.dtype)


class Head(nn.Module):
    """MLP head: dense, GELU, norm, logits in float32."""

    codebook_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n i"]) -> Float[Array, "b n v"]:
        x = layers.RMSNorm(name="norm_in")(x)
        x = nn.gelu(layers.Dense(x.shape[-1], (axes.EMBED, axes.MLP), dtype=self.dtype, name="dense")(x))
        x = layers.RMSNorm(name="norm")(x)
        dense = layers.Dense(self.codebook_size, (axes.EMBED, axes.VOCAB), True, dtype=self.dtype, name="logits")
        return dense(x).astype(jnp.float32)


class TokenTransformer(nn.Module):
    """Predicts masked image tokens from the visible ones and a text (`BaseSpec` or `SuperResSpec`).

    The mask id is `codebook_size`. With a `low_grid` in the spec it is the super-resolution model:
    low-resolution tokens pass their own encoder and are concatenated with the text; the layers'
    self-attention is multi-axis.
    """

    spec: Any

    @property
    def super_resolution(self) -> bool:
        return hasattr(self.spec, "low_grid")

    def setup(self):
        s, dtype = self.spec, jnp.dtype(self.spec.dtype)
        shared = dict(
            dropout=s.dropout,
            qk_norm=s.qk_norm,
            relative=s.relative_positions,
            remat=s.remat,
            unroll=s.unroll,
            implementation=s.attention,
            dtype=dtype,
        )
        self.text_encoder = t5.from_spec(s.text, dtype=dtype, remat=s.remat, unroll=s.unroll)
        self.text_projection = layers.Dense(s.width, (axes.EMBED, axes.MLP), dtype=dtype)
        self.text_norm = layers.RMSNorm()
        self.memory = transformer.MemoryProjection(s.layers, s.heads, s.width // s.heads, s.qk_norm, dtype)
        self.embedding = TokenEmbedding(s.codebook_size + 1, s.grid, s.width, dtype)
        self.head = Head(s.codebook_size, dtype)
        if self.super_resolution:
            self.low_embedding = TokenEmbedding(s.low_codebook_size, s.low_grid, s.width, dtype)
            self.low_stack = transformer.Stack(s.low_layers, s.heads, s.mlp_width, s.low_grid, **shared)
            self.low_norm = layers.RMSNorm()
            shared |= dict(block=s.block, memory_grid=s.low_grid)
        self.stack = transformer.Stack(s.layers, s.heads, s.mlp_width, s.grid, **shared)

    def encode_text(
        self, text_ids: Int[Array, "b t"], text_mask: Bool[Array, "b t"], deterministic: bool = True
    ) -> Float[Array, "b t e"]:
        """Text ids to the text encoder's embeddings."""
        return self.text_encoder(text_ids, text_mask, deterministic=deterministic)

    def condition(
        self,
        text_embeddings: Float[Array, "b t e"],
        text_mask: Bool[Array, "b t"],
        low_tokens: Int[Array, "b l"] | None = None,
        deterministic: bool = True,
    ) -> transformer.Memory:
        """Everything that the layers attend to. An all-False `text_mask` drops the text."""
        # A frozen text encoder may have had its examples split otherwise (config.frozen_rules).
        text_embeddings = nn.with_logical_constraint(text_embeddings, (axes.BATCH, axes.TEXT, None))
        memory = self.text_norm(self.text_projection(text_embeddings))
        mask = text_mask
        if self.super_resolution:
            low = self.low_norm(self.low_stack(self.low_embedding(low_tokens), deterministic=deterministic))
            memory = jnp.concatenate([low.astype(memory.dtype), memory], axis=1)
            mask = jnp.concatenate([jnp.ones(low_tokens.shape, bool), text_mask], axis=1)
        return self.memory(memory, mask)

    def logits(
        self, tokens: Int[Array, "b n"], memory: transformer.Memory, deterministic: bool = True
    ) -> Float[Array, "b n v"]:
        """Logits of every place, masked (id `codebook_size`) or not; float32."""
        return self.head(self.stack(self.embedding(tokens), memory, deterministic))

    def __call__(
        self,
        tokens: Int[Array, "b n"],
        text_ids: Int[Array, "b t"],
        text_mask: Bool[Array, "b t"],
        low_tokens: Int[Array, "b l"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n v"]:
        embeddings = self.encode_text(text_ids, text_mask, deterministic)
        return self.logits(tokens, self.condition(embeddings, text_mask, low_tokens, deterministic), deterministic)
