"""MaskGIT's token predictor (arXiv 2202.04200, sections 3.2 and 4): the class is one more token in the sequence.

It is called in the three moves of `muse.TokenTransformer`, so that tasks and samplers need not know
which of them they drive: a class is a text of one id. Id 0, or a mask that is False, is "no class",
which has an embedding of its own, so that guidance works.

Differs from the paper: our layers, which normalize before attention and MLP by the root mean square and
have no biases, where MaskGIT's are BERT's, which normalize after them; positions are a sum of a row's
and a column's; the head is not tied to the embedding.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from muse_jax.models import axes, layers, muse, transformer


class MaskGIT(nn.Module):
    """Predicts masked image tokens from the visible ones and a class (`MaskGITSpec`)."""

    spec: Any

    def setup(self):
        s, dtype = self.spec, jnp.dtype(self.spec.dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (axes.POSITIONS, axes.EMBED))
        self.classes = self.param("classes", init, (s.classes + 1, s.width))  # its first row is no class
        self.embedding = muse.TokenEmbedding(s.codebook_size + 1, s.grid, s.width, dtype)
        self.stack = transformer.Stack(
            s.layers,
            s.heads,
            s.mlp_width,
            s.grid,
            dropout=s.dropout,
            qk_norm=s.qk_norm,
            relative=s.relative_positions,
            remat=s.remat,
            unroll=s.unroll,
            implementation=s.attention,
            dtype=dtype,
        )
        self.head = muse.Head(s.codebook_size, dtype)

    def encode_text(
        self, text_ids: Int[Array, "b 1"], text_mask: Bool[Array, "b 1"], deterministic: bool = True
    ) -> Int[Array, "b 1"]:
        """The ids as they are: a class needs no encoder."""
        return text_ids

    def condition(
        self,
        text_ids: Int[Array, "b 1"],
        text_mask: Bool[Array, "b 1"],
        low_tokens: None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b 1 i"]:
        """The class token. A False `text_mask` makes it that of no class."""
        ids = jnp.where(text_mask, text_ids, 0)
        return layers.looked_up(self.classes, ids, axes.EMBED).astype(jnp.dtype(self.spec.dtype))

    def logits(
        self, tokens: Int[Array, "b n"], memory: Float[Array, "b 1 i"], deterministic: bool = True
    ) -> Float[Array, "b n v"]:
        """Logits of every place, masked (id `codebook_size`) or not; float32."""
        x = jnp.concatenate([self.embedding(tokens), memory], axis=1)
        return self.head(self.stack(x, None, deterministic)[:, : tokens.shape[1]])

    def __call__(
        self,
        tokens: Int[Array, "b n"],
        text_ids: Int[Array, "b 1"],
        text_mask: Bool[Array, "b 1"],
        low_tokens: None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n v"]:
        return self.logits(tokens, self.condition(text_ids, text_mask), deterministic)
