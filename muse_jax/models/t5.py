"""T5's encoder: what turns prompt ids into the embeddings that the transformers cross-attend to.

T5 (Raffel et al. 2020, arXiv 1910.10683) with the changes of T5 1.1 (gated GELU, Shazeer 2020,
arXiv 2002.05202). Muse reads its prompts with a frozen T5-XXL (section 2.1); the scenes train a
small one along with the base model. Parameter names and shapes are T5X's (``encoder/.../kernel`` of
two dimensions), with the layers stacked along a first axis, so that its weights map by path.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from muse_jax.models import axes, layers

# Added to the logits of keys that may not be seen. Far below any logit, so that their weight is
# exactly 0 in float32, and finite, so that a row that may see nothing does not become NaN.
_UNSEEN = -1e10


def relative_position_buckets(queries: int, keys: int, buckets: int, max_distance: int) -> Int[Array, "q k"]:
    """The bucket of every (query, key) pair of positions, in both directions (T5, section 2.1).

    Half of the buckets are for keys at or before the query, half for those after it. Within a half,
    the first half have a distance each; the rest grow logarithmically up to `max_distance`, beyond
    which all share the last one.

    >>> relative_position_buckets(1, 4, buckets=32, max_distance=128).tolist()
    [[0, 17, 18, 19]]
    >>> relative_position_buckets(4, 1, buckets=32, max_distance=128).tolist()
    [[0], [1], [2], [3]]
    """
    offset = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = jnp.abs(offset)
    # Distances below `exact` never use this branch; the maximum keeps the logarithm finite there.
    log_ratio = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    # The small constant is T5X's: log(2**k) / log(2**n) may come out just below the integer it is.
    far = exact + ((log_ratio + 1e-7) * (half - exact)).astype(jnp.int32)
    bucket = jnp.where(distance < exact, distance, jnp.minimum(far, half - 1))
    return bucket + jnp.where(offset > 0, half, 0)


class RMSNorm(nn.Module):
    """x / rms(x) * scale: no mean, no bias; computed in float32, returned in `dtype`."""

    dtype: Any = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,)), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


class _Projection(nn.Module):
    """x @ kernel, without bias; the product is accumulated in float32 and returned in `out_dtype`.

    Where devices have some of the kernel's rows each, they exchange their parts of the sum in `dtype`.
    """

    features: int
    names: tuple[str, str]
    init: Any
    dtype: Any = jnp.float32
    out_dtype: Any = None  # None: dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        init = nn.with_logical_partitioning(self.init, self.names)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        summed = self.dtype if layers.is_split(self.names[0]) else jnp.float32
        y = layers.product(x.astype(self.dtype), layers.gathered(kernel, self.names, self.dtype), summed)
        return y.astype(self.out_dtype or self.dtype)


class _RelativePositionBias(nn.Module):
    heads: int
    buckets: int
    max_distance: int
    init: Any

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "h t t"]:
        init = nn.with_logical_partitioning(self.init, (axes.HEADS, axes.BUCKETS))
        table = self.param("rel_embedding", init, (self.heads, self.buckets))
        return table[:, relative_position_buckets(length, length, self.buckets, self.max_distance)]


class _Attention(nn.Module):
    heads: int
    head_dim: int
    qk_norm: bool
    dropout: float
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], bias: Float[Array, "b h t t"]) -> Float[Array, "b t d"]:
        inner = self.heads * self.head_dim
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def project(name: str, init: Any) -> Array:
            y = _Projection(inner, (axes.EMBED, axes.HEADS), init, self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], self.heads, self.head_dim)

        # T5 does not divide the logits by sqrt(head_dim): the query's initial scale is that much
        # smaller, 1 / (width * head_dim) in variance.
        query = project("query", nn.initializers.variance_scaling(1.0 / self.head_dim, "fan_in", "normal"))
        key = project("key", init)
        value = project("value", init)
        if self.qk_norm:
            query = layers.RMSNorm(name="query_norm")(query) * self.head_dim**-0.5
            key = layers.RMSNorm(name="key_norm")(key)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(self.dtype)
        weights = nn.Dropout(self.dropout, broadcast_dims=(-2,))(weights, deterministic=self.deterministic)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:-1], inner)
        return _Projection(x.shape[-1], (axes.HEADS, axes.EMBED), init, self.dtype, jnp.float32, name="out")(y)


class _MLP(nn.Module):
    width: int
    gated: bool
    dropout: float
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

        def widen(name: str) -> Array:
            return _Projection(self.width, (axes.EMBED, axes.MLP), init, self.dtype, name=name)(x)

        hidden = nn.gelu(widen("wi_0"), approximate=True) * widen("wi_1") if self.gated else nn.relu(widen("wi"))
        hidden = nn.Dropout(self.dropout, broadcast_dims=(-2,))(hidden, deterministic=self.deterministic)
        return _Projection(x.shape[-1], (axes.MLP, axes.EMBED), init, self.dtype, jnp.float32, name="wo")(hidden)


def _residual(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The residual stream where it lies."""
    known = axes.RESIDUAL in dict(nn.get_logical_axis_rules())
    return nn.with_logical_constraint(x, (axes.RESIDUAL if known else axes.BATCH, axes.TEXT, None))


def _multiplied(x: Float[Array, "b t d"], split: str) -> Float[Array, "b t d"]:
    """What kernels multiply. Where these are split by their axis `split`, each part of them wants more examples."""
    rules = dict(nn.get_logical_axis_rules())
    if axes.RESIDUAL in rules and not rules[split]:
        return _residual(x)
    return nn.with_logical_constraint(x, (axes.BATCH, axes.TEXT, None))


class _Layer(nn.Module):
    """Pre-norm self-attention and MLP; the residual stream stays in float32."""

    heads: int
    head_dim: int
    mlp_width: int
    gated: bool
    qk_norm: bool
    dropout: float
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], bias: Float[Array, "b h t t"]) -> tuple[Float[Array, "b t d"], None]:
        def drop(y: Array) -> Array:
            return nn.Dropout(self.dropout, broadcast_dims=(-2,))(y, deterministic=self.deterministic)

        x = _residual(x)
        y = _multiplied(RMSNorm(self.dtype, name="pre_attention_layer_norm")(x), axes.HEADS)
        attention = _Attention(
            *(self.heads, self.head_dim, self.qk_norm, self.dropout, self.deterministic, self.dtype), name="attention"
        )
        x = x + drop(_residual(attention(y, bias)))
        y = _multiplied(RMSNorm(self.dtype, name="pre_mlp_layer_norm")(x), axes.MLP)
        mlp = _MLP(self.mlp_width, self.gated, self.dropout, self.deterministic, self.dtype, name="mlp")
        return x + drop(_residual(mlp(y))), None


class T5Encoder(nn.Module):
    """T5's encoder, of any size.

    The residual stream is float32 whatever `dtype` is: a bfloat16 stream loses T5-XXL's embeddings
    of short prompts. Parameters: ``token_embedder/embedding`` [vocabulary, width],
    ``encoder/relpos_bias/rel_embedding`` [heads, buckets], ``encoder/layers/...`` with a first axis
    of `layers`, ``encoder/encoder_norm/scale``.

    Attributes:
      vocabulary_size: ids are 0 .. vocabulary_size - 1; others give NaN.
      layers, width, heads, head_dim, mlp_width: heads * head_dim need not be the width.
      position_buckets, position_max_distance: of the relative positions.
      dropout: on the embeddings, attention weights, MLP and both residual branches.
      gated: T5 1.1's gated GELU; False: T5 1.0's ReLU.
      qk_norm: RMS norms on queries and keys, and a position bias that starts wide. T5's own logits grow
        with its weights until the bias means nothing beside them, and an encoder that is learned from
        nothing along with the image model then takes "a above b" for "b above a".
      dtype: of the products.
      unroll: layers per iteration of the scan over layers.
      remat: "none", "full", or a name in `jax.checkpoint_policies`.
    """

    vocabulary_size: int
    layers: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    position_buckets: int = 32
    position_max_distance: int = 128
    dropout: float = 0.0
    gated: bool = True
    qk_norm: bool = False
    dtype: Any = "float32"
    unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(
        self, text_ids: Int[Array, "b t"], text_mask: Bool[Array, "b t"], deterministic: bool = True
    ) -> Float[Array, "b t d"]:
        """Embeddings of the prompts, float32.

        What stands where `text_mask` is False changes nothing elsewhere, and its own output is 0;
        a prompt of which nothing is visible is 0 everywhere.
        """
        x = _Embedding(self.vocabulary_size, self.width, name="token_embedder")(text_ids)
        x = _Stack(
            *(self.layers, self.heads, self.head_dim, self.mlp_width, self.position_buckets),
            *(self.position_max_distance, self.dropout, self.gated, self.qk_norm),
            *(jnp.dtype(self.dtype), self.unroll, self.remat),
            deterministic=deterministic,
            name="encoder",
        )(x, text_mask)
        return jnp.where(text_mask[..., None], x, 0)


class _Embedding(nn.Module):
    vocabulary_size: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (axes.VOCAB, axes.EMBED))
        table = self.param("embedding", init, (self.vocabulary_size, self.width))
        return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(jnp.float32)


class _Stack(nn.Module):
    """The layers, scanned, with the position bias that all of them share, and the last norm."""

    layers: int
    heads: int
    head_dim: int
    mlp_width: int
    buckets: int
    max_distance: int
    dropout: float
    gated: bool
    qk_norm: bool
    dtype: Any
    unroll: int
    remat: str
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        drop = nn.Dropout(self.dropout, broadcast_dims=(-2,))
        x = drop(x, deterministic=self.deterministic)
        # Normed logits start with a variance of 1: with 3 squared, each head starts on a few offsets of its own.
        wide, plain = nn.initializers.normal(3.0), nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        bias = _RelativePositionBias(
            *(self.heads, self.buckets, self.max_distance, wide if self.qk_norm else plain), name="relpos_bias"
        )(x.shape[1])
        bias = bias[None] + jnp.where(mask, 0.0, _UNSEEN)[:, None, None, :]
        layer = _Layer
        if self.remat != "none":
            policy = None if self.remat == "full" else getattr(jax.checkpoint_policies, self.remat)
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            check_constancy_invariants=self.is_initializing(),  # it traces every layer once more
        )
        x, _ = stack(
            *(self.heads, self.head_dim, self.mlp_width, self.gated, self.qk_norm),
            *(self.dropout, self.deterministic, self.dtype),
            name="layers",
        )(x, bias)
        x = RMSNorm(jnp.float32, name="encoder_norm")(x)
        return drop(x, deterministic=self.deterministic)


def from_spec(spec: Any, **settings: Any) -> T5Encoder:
    """The encoder of a `TextEncoderSpec`; `settings` are the fields that the spec lacks (dtype, remat, unroll)."""
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__ if name not in ("trainable", "weights")}
    return T5Encoder(**fields, **settings)
