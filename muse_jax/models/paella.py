"""Paella's token predictor (Rampas et al. 2022, arXiv 2211.07292): a U-Net of convolutions without self-attention.

Called in the moves of `models.muse`, ``encode_text``, ``condition``, ``logits``, with the time of the noise as one
more argument of the last. Nothing in it depends on the size of the grid: the same parameters serve any `spec.grid`
of which the coarsest level has at least two rows and columns.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from muse_jax.models import axes, layers, t5, transformer

TIME_WIDTH = 64  # of the sinusoids that stand for the time
TIME_SCALE = 10_000.0  # the time in [0, 1] becomes a position of so many
INNER = 4  # an MLP is so many times wider inside


class Condition(NamedTuple):
    """What a picture is to show: one prompt for all of it, or p prompts of which each place has its shares.

    Attributes:
      vectors: ``[b, p, e]``, zeros for no prompt.
      memories: of every level keys and values ``[blocks, b, p, t, heads, head_dim]`` and mask ``[b, p, t]``;
        empty without attention.
      shares: ``[b, n, p]``, those of each place adding up to 1; None where there is one prompt.
    """

    vectors: jax.Array
    memories: tuple[transformer.Memory, ...] = ()
    shares: jax.Array | None = None

    def grouped(self, shares: Float[Array, "b n p"]) -> "Condition":
        """Each p neighbours of the batch as the prompts of one picture."""
        prompts = shares.shape[-1]

        def group(x: jax.Array) -> jax.Array:
            return x.reshape(-1, prompts, *x.shape[2:])

        memories = (
            transformer.Memory(jax.vmap(group)(m.keys), jax.vmap(group)(m.values), group(m.mask)) for m in self.memories
        )
        return Condition(group(self.vectors), tuple(memories), shares)

    def at(self, level: int, grid: tuple[int, int]) -> "Condition":
        """As a level's blocks see it: shares of its squares of places, without the memories."""
        shares = self.shares
        if shares is not None and level:
            b, _, p = shares.shape
            (rows, columns), side = grid, 2**level
            beyond = ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0))
            squares = jnp.pad(shares.reshape(b, rows, columns, p), beyond, mode="edge")
            squares = squares.reshape(b, -(-rows // side), side, -(-columns // side), side, p)
            shares = jnp.mean(squares, axis=(2, 4)).reshape(b, -1, p)
        return Condition(self.vectors, (), shares)


def blended(x: Float[Array, "b p m c"], shares: Float[Array, "b n p"] | None) -> Float[Array, "b m2 c"]:
    """What each prompt gives for all places (m = 1) or for each (m = n), blended by the places' shares.

    Of equal prompts to the bit what one of them gives: the first one's, and shares of the others' differences to it.
    """
    if shares is None:
        return x[:, 0]
    differences = x[:, 1:] - x[:, :1]
    return x[:, 0] + jnp.sum(jnp.moveaxis(shares[..., 1:], -1, 1)[..., None].astype(x.dtype) * differences, axis=1)


def time_embedding(t: Float[Array, "b"]) -> Float[Array, "b c"]:
    """Sines and cosines of the time in [0, 1], `TIME_WIDTH` numbers."""
    half = TIME_WIDTH // 2
    angles = t[:, None] * TIME_SCALE * TIME_SCALE ** (-jnp.arange(half) / (half - 1))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def normalized(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Layer norm without parameters, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel by itself, the picture mirrored at its edges.

    As nine shifted products: XLA's CPU backend runs grouped convolutions many times slower.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        height, width, channels = x.shape[1:]
        names = (axes.ROWS, axes.COLUMNS, axes.CHANNELS_OUT)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=(), batch_axis=(2,)
        )
        kernel = self.param("kernel", nn.with_logical_partitioning(init, names), (3, 3, channels))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, names[2:])
        bias = self.param("bias", zeros, (channels,)).astype(self.dtype)
        kernel = layers.gathered(kernel, names, self.dtype)
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        for row in range(3):
            for column in range(3):
                bias = bias + padded[:, row : row + height, column : column + width] * kernel[row, column]
        return bias


class Modulation(nn.Module):
    """Layer norm scaled and shifted by the condition: g w norm(x) + b w, with w linear in prompt and time.

    g and b are learned numbers; at each place w has the prompts that are its.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b k"], condition: Condition
    ) -> Float[Array, "b h w c"]:
        b, h, w, width = x.shape
        # One linear layer of [prompt; time] as two, of which the prompts' are blended: the same, for less.
        text = layers.Dense(width, (axes.EMBED, axes.MLP), True, dtype=self.dtype, name="text")(condition.vectors)
        time = layers.Dense(width, (axes.EMBED, axes.MLP), dtype=self.dtype, name="time")(time)
        both = blended(text[:, :, None], condition.shares) + time[:, None]
        both = both.reshape(b, *((1, 1) if condition.shares is None else (h, w)), width)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ())
        scale, shift = (self.param(name, init, ()).astype(self.dtype) for name in ("scale", "shift"))
        return normalized(x) * (scale * both) + shift * both


class TextAttention(nn.Module):
    """Attention of the places to the prompts' words.

    Differs from the paper: Paella's first version has the prompt's vector alone. This is of its second one, whose
    attention also sees the picture; without that the network stays one of convolutions, for grids of any size.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], memory: transformer.Memory, shares: Float[Array, "b n p"] | None
    ) -> Float[Array, "b n c"]:
        b, n, width = x.shape
        query = layers.HeadProjection(self.heads, width // self.heads, self.dtype, name="query")(x)
        query = layers.RMSNorm(name="query_norm")(query)
        query = jnp.broadcast_to(query[:, None], (b, memory.mask.shape[1], *query.shape[1:]))
        seen = layers.attend(query, *memory).reshape(b, -1, n, width)
        seen = blended(seen, shares).reshape(b, n, self.heads, -1)
        return layers.OutProjection(width, dtype=self.dtype, name="out")(seen)


class Block(nn.Module):
    """Depthwise convolution, modulated norm, MLP, learned scale; with `heads`, then attention to the text."""

    spec: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        memory: transformer.Memory | None,
        skip: Float[Array, "b h w c"] | None,
        time: Float[Array, "b k"],
        condition: Condition,
        deterministic: bool,
    ) -> tuple[Float[Array, "b h w c"], None]:
        s, width, dtype = self.spec, x.shape[-1], jnp.dtype(self.spec.dtype)
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.ROWS, axes.COLUMNS, axes.EMBED))
        y = Modulation(dtype, name="modulation")(DepthwiseConv(dtype, name="depthwise")(x), time, condition)
        y = y if skip is None else jnp.concatenate([y, skip], axis=-1)
        y = nn.gelu(layers.Dense(INNER * width, (axes.EMBED, axes.MLP), True, dtype=dtype, name="in")(y))
        y = nn.Dropout(s.dropout)(y, deterministic) if s.dropout else y
        out_scale = 1 / (sum(s.down_blocks) + sum(s.up_blocks))  # the branches start small, their number aside
        y = layers.Dense(width, (axes.MLP, axes.EMBED), True, out_scale, dtype, name="out")(y)
        x = x + y * self._scale("scale", width)
        if memory is not None:
            flat = normalized(x).reshape(x.shape[0], -1, width)
            seen = TextAttention(s.heads, dtype, name="attention")(flat, memory, condition.shares)
            x = x + seen.reshape(x.shape) * self._scale("attention_scale", width)
        return x, None

    def _scale(self, name: str, width: int) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.spec.layer_scale), (axes.EMBED,))
        return self.param(name, init, (width,)).astype(self.spec.dtype)


class Blocks(nn.Module):
    """`depth` equal blocks, their parameters stacked along a first axis, applied by one scan."""

    spec: Any
    depth: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        memory: transformer.Memory | None,
        time: Float[Array, "b k"],
        condition: Condition,
        deterministic: bool,
    ) -> Float[Array, "b h w c"]:
        scanned = nn.scan(
            transformer.rematerialized(Block, self.spec.remat, static_argnums=(6,)),
            length=self.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(
                nn.broadcast if memory is None else transformer.Memory(0, 0, nn.broadcast),
                *(nn.broadcast,) * 4,
            ),
            unroll=min(self.spec.unroll, self.depth),
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            check_constancy_invariants=self.is_initializing(),  # it traces every layer once more
        )
        return scanned(self.spec, name="layers")(x, memory, None, time, condition, deterministic)[0]


class UNet(nn.Module):
    """Levels of blocks, each of half the rows and columns, and back; the way down joins the way up at each level."""

    spec: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b k"], condition: Condition, deterministic: bool
    ) -> Float[Array, "b h w c"]:
        s = self.spec
        join = transformer.rematerialized(Block, s.remat, static_argnums=(6,))
        levels = range(len(s.widths))
        here = [(time, condition.at(level, s.grid), deterministic) for level in levels]
        down = []
        for level in levels:
            x = self._resized(nn.Conv, level, f"down{level}")(x) if level else x
            memory = _memory(condition, level, slice(0, s.down_blocks[level]))
            x = Blocks(s, s.down_blocks[level], name=f"blocks{level}_down")(x, memory, *here[level])
            down.append(x)
        for level in reversed(levels):
            first, last = s.down_blocks[level], s.down_blocks[level] + s.up_blocks[level]
            if level != levels[-1]:
                rows, columns = down[level].shape[1:3]  # where they are odd, one less than twice the coarser level's
                x = self._resized(nn.ConvTranspose, level, f"up{level}")(x)[:, :rows, :columns]
                x, _ = join(s, name=f"join{level}")(x, _memory(condition, level, first), down[level], *here[level])
                first += 1
            if first < last:
                memory = _memory(condition, level, slice(first, last))
                x = Blocks(s, last - first, name=f"blocks{level}_up")(x, memory, *here[level])
        return x

    def _resized(self, conv: type[nn.Module], level: int, name: str) -> nn.Module:
        names = (axes.ROWS, axes.COLUMNS, axes.CHANNELS_IN, axes.CHANNELS_OUT)
        bias = nn.with_logical_partitioning(nn.initializers.zeros, names[3:])
        kernel = layers.kernel_init(names, (0, 1, 2))
        width, dtype = self.spec.widths[level], self.spec.dtype
        return conv(width, (4, 4), (2, 2), dtype=dtype, kernel_init=kernel, bias_init=bias, name=name)


def _memory(condition: Condition, level: int, blocks: int | slice) -> transformer.Memory | None:
    if not condition.memories:
        return None
    keys, values, mask = condition.memories[level]
    return transformer.Memory(keys[blocks], values[blocks], mask)


class CodeEmbedding(nn.Module):
    """A learned vector for each code; no positions."""

    codes: int
    width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (axes.POSITIONS, axes.EMBED))
        return self.param("tokens", init, (self.codes, self.width))[tokens]


class Paella(nn.Module):
    """Predicts a picture's tokens from noised ones, the time that says how much noise, and a prompt (`PaellaSpec`)."""

    spec: Any

    def setup(self):
        s, dtype = self.spec, jnp.dtype(self.spec.dtype)
        self.text_encoder = t5.from_spec(s.text, dtype=dtype, remat=s.remat, unroll=s.unroll)
        if s.heads:
            self.text_projection = layers.Dense(s.widths[0], (axes.EMBED, axes.MLP), dtype=dtype)
            self.text_norm = layers.RMSNorm()
            self.memories = [
                transformer.MemoryProjection(down + up, s.heads, width // s.heads, True, dtype)
                for width, down, up in zip(s.widths, s.down_blocks, s.up_blocks, strict=True)
            ]
        if s.picture_encoder:
            self.picture_in = layers.Dense(s.text.width, (axes.EMBED, axes.MLP), True, dtype=dtype)
            self.picture_out = layers.Dense(s.text.width, (axes.MLP, axes.EMBED), True, dtype=dtype)
        self.embedding = CodeEmbedding(s.codebook_size, s.widths[0])
        self.unet = UNet(s)
        self.norm = layers.RMSNorm()
        self.head = layers.Dense(s.codebook_size, (axes.EMBED, axes.VOCAB), True, dtype=dtype)

    def encode_text(
        self, text_ids: Int[Array, "b t"], text_mask: Bool[Array, "b t"], deterministic: bool = True
    ) -> Float[Array, "b t e"]:
        """Text ids to the text encoder's embeddings."""
        return self.text_encoder(text_ids, text_mask, deterministic=deterministic)

    def condition(
        self,
        text_embeddings: Float[Array, "b t e"],
        text_mask: Bool[Array, "b t"],
        picture: Int[Array, "b n"] | None = None,
        deterministic: bool = True,
    ) -> Condition:
        """What all blocks see of a prompt. An all-False `text_mask` drops the text.

        Differs from the paper: the vector is the mean of a T5's outputs instead of CLIP's.

        Args:
          picture: tokens of a picture to make others like, its vector instead of the text's; `codebook_size`
            everywhere where there is none. Only with `spec.picture_encoder`.
        """
        seen = text_mask[..., None].astype(text_embeddings.dtype)
        vector = jnp.sum(text_embeddings * seen, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1)
        if picture is not None:
            given = jnp.any(picture < self.spec.codebook_size, axis=-1, keepdims=True)
            vector = jnp.where(given, self.encode_picture(picture), vector)
        memories = ()
        if self.spec.heads:
            text = self.text_norm(self.text_projection(text_embeddings))
            memories = tuple(_one_prompt(project(text, text_mask)) for project in self.memories)
        return Condition(vector[:, None], memories)

    def encode_picture(self, tokens: Int[Array, "b n"]) -> Float[Array, "b e"]:
        """A picture's vector, in the place of a text's: what is in it, whatever the place.

        Differs from the paper, whose CLIP has encoders of texts and pictures with one space: this one is trained
        along, as the text encoder may be.
        """
        x = self._embedded(jnp.minimum(tokens, self.spec.codebook_size - 1))
        x = jnp.concatenate([x, *(jnp.roll(x, shift, axis) for axis in (1, 2) for shift in (1, -1))], axis=-1)
        return jnp.mean(self.picture_out(nn.gelu(self.picture_in(x))), axis=(1, 2))

    def logits(
        self, tokens: Int[Array, "b n"], condition: Condition, t: Float[Array, "*b"], deterministic: bool = True
    ) -> Float[Array, "b n v"]:
        """Logits of every place; float32.

        Args:
          t: the time in [0, 1], of all or of each: 0 where all tokens are noise, 1 where none is.
        """
        time = time_embedding(jnp.broadcast_to(t, tokens.shape[:1])).astype(self.spec.dtype)
        x = self.unet(self._embedded(tokens), time, condition, deterministic)
        return self.head(self.norm(x)).reshape(*tokens.shape, -1).astype(jnp.float32)

    def _embedded(self, tokens: Int[Array, "b n"]) -> Float[Array, "b h w c"]:
        return self.embedding(tokens).reshape(tokens.shape[0], *self.spec.grid, -1).astype(self.spec.dtype)

    def __call__(
        self,
        tokens: Int[Array, "b n"],
        text_ids: Int[Array, "b t"],
        text_mask: Bool[Array, "b t"],
        picture: Int[Array, "b n"] | None = None,
        t: Float[Array, "*b"] | float = 0.0,
        deterministic: bool = True,
    ) -> Float[Array, "b n v"]:
        if self.spec.picture_encoder and self.is_initializing():
            picture = tokens  # so that there are parameters for it
        embeddings = self.encode_text(text_ids, text_mask, deterministic)
        return self.logits(
            tokens, self.condition(embeddings, text_mask, picture, deterministic), jnp.asarray(t), deterministic
        )


def _one_prompt(memory: transformer.Memory) -> transformer.Memory:
    return transformer.Memory(memory.keys[:, :, None], memory.values[:, :, None], memory.mask[:, None])
