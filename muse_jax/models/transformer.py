"""Stacks of transformer layers: parameters stacked along a first axis, applied by one scan."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from muse_jax.models import axes, layers


class Memory(NamedTuple):
    """What cross-attention attends to: keys and values of every layer, computed once.

    keys, values: ``[layers, b, m, heads, head_dim]``; mask: ``[b, m]``, True where there is something.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


class MemoryProjection(nn.Module):
    """Keys and values of all layers from one sequence of embeddings."""

    layers: int
    heads: int
    head_dim: int
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b m i"], mask: Bool[Array, "b m"]) -> Memory:
        names = (axes.LAYERS, axes.EMBED, axes.HEADS, axes.HEAD_DIM)
        shape = (self.layers, x.shape[-1], self.heads, self.head_dim)
        # fan-in is the embedding axis: the stack is a batch of kernels
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=(2, 3), batch_axis=(0,)
        )
        init = nn.with_logical_partitioning(init, names)
        kernels = [self.param(name, init, shape) for name in ("key", "value")]
        if layers.on_many_devices():  # in one exchange
            kernels = layers.gathered(jnp.stack(kernels), (None, *names), self.dtype)
            keys, values = jnp.einsum("bmi,klihd->klbmhd", x.astype(self.dtype), kernels)
        else:
            keys, values = (jnp.einsum("bmi,lihd->lbmhd", x.astype(self.dtype), k.astype(self.dtype)) for k in kernels)
        if self.qk_norm:
            keys = layers.RMSNorm(name="key_norm")(keys)
        return Memory(keys, values, mask)


class Layer(nn.Module):
    """Pre-norm layer: self-attention, cross-attention when there is a memory, MLP.

    With `later`, the kernels of the next layer's `SelfAttention.PROJECTIONS` as they are stored, it gathers these and
    hands them on as `ahead`. Each of a layer's first products is short, and would wait for its kernel.
    """

    heads: int
    mlp_width: int
    depth: int  # of the stack; residual branches start at 1 / sqrt(their number)
    cross: bool
    grid: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    dropout: float = 0.0
    qk_norm: bool = False
    relative: bool = False
    memory_grid: tuple[int, int] | None = None  # of the memory's first tokens, if they have places
    implementation: str = "xla"  # of attention; see layers.attend
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, carry: tuple[Any, Any], keys: Any, values: Any, later: Any, mask: Any, deterministic: bool
    ) -> tuple[tuple[Float[Array, "b n i"], Any], None]:
        x, ahead = carry
        scale = 1.0 / ((2 + self.cross) * self.depth)
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.TOKENS, axes.EMBED))

        def residual(y):
            return nn.Dropout(self.dropout, broadcast_dims=(1,))(y, deterministic) if self.dropout else y

        places = (self.grid, self.block)
        how = (scale, self.implementation, self.dtype)
        attention = layers.SelfAttention(self.heads, *places, self.qk_norm, self.relative, *how, name="self_attention")
        x = x + residual(attention(layers.RMSNorm(name="self_norm")(x), ahead))
        token = None
        if self.cross and layers.on_many_devices():
            x, token = layers.awaited(x)
        if self.cross:
            grids = (self.grid, self.memory_grid) if self.relative and self.memory_grid else None
            attention = layers.CrossAttention(self.heads, self.qk_norm, grids, *how, name="cross_attention")
            x = x + residual(attention(layers.RMSNorm(name="cross_norm")(x), keys, values, mask))
        if later is not None:
            x, later = jax.lax.optimization_barrier((x, later))  # links are busy with this layer's kernels until here
            ahead = gathered_projections(later, self.dtype)
        mlp = layers.MLP(self.mlp_width, scale, self.dtype, name="mlp")
        return (x + residual(mlp(layers.RMSNorm(name="mlp_norm")(x), token)), ahead), None


def gathered_projections(kernels: Float[Array, "3 i h d"], dtype: Any) -> Float[Array, "3 i h d"]:
    """A layer's `SelfAttention.PROJECTIONS` as they are multiplied, in one exchange."""
    return layers.gathered(kernels, (None, *layers.HeadProjection.NAMES), dtype)


class Stack(nn.Module):
    """`depth` layers scanned; `memory` gives each its keys and values."""

    depth: int
    heads: int
    mlp_width: int
    grid: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    dropout: float = 0.0
    qk_norm: bool = False
    relative: bool = False
    memory_grid: tuple[int, int] | None = None
    remat: str = "none"
    unroll: int = 1
    implementation: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n i"], memory: Memory | None = None, deterministic: bool = True
    ) -> Float[Array, "b n i"]:
        layer = rematerialized(Layer, self.remat, static_argnums=(6,))
        scanned = nn.scan(
            layer,
            length=self.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast),
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            # It traces every layer once more; seeds give the parameters that they do with it.
            check_constancy_invariants=self.is_initializing(),
        )(
            heads=self.heads,
            mlp_width=self.mlp_width,
            depth=self.depth,
            cross=memory is not None,
            grid=self.grid,
            block=self.block,
            dropout=self.dropout,
            qk_norm=self.qk_norm,
            relative=self.relative,
            memory_grid=self.memory_grid,
            implementation=self.implementation,
            dtype=self.dtype,
            name="layers",
        )
        keys, values, mask = memory if memory is not None else (None, None, None)
        ahead = later = None
        # Without "none" kernels are not kept for the backward pass, which those gathered ahead would be.
        if self.remat == "none" and layers.is_gathered(layers.HeadProjection.NAMES) and not self.is_initializing():
            kernels = self._projections()
            ahead, later = gathered_projections(kernels[0], self.dtype), jnp.roll(kernels, -1, axis=0)
        (x, _), _ = scanned((x, ahead), keys, values, later, mask, deterministic)
        return x

    def _projections(self) -> Float[Array, "layers 3 i h d"]:
        """Every layer's `SelfAttention.PROJECTIONS`, without a gradient."""
        attention = self.variables["params"]["layers"]["self_attention"]
        kernels = [attention[name]["kernel"].astype(self.dtype) for name in layers.SelfAttention.PROJECTIONS]
        return jax.lax.stop_gradient(jnp.stack(kernels, axis=1))


def rematerialized(module: type[nn.Module], policy: str, static_argnums: tuple[int, ...]) -> type[nn.Module]:
    """The module under `jax.checkpoint`: "none" not at all, "full" everything again, else a named policy."""
    if policy == "none":
        return module
    if policy == "full":
        return nn.remat(module, prevent_cse=False, static_argnums=static_argnums)
    if not hasattr(jax.checkpoint_policies, policy):
        raise ValueError(f"model.remat is {policy!r}; expected 'none', 'full' or a name in jax.checkpoint_policies.")
    named = getattr(jax.checkpoint_policies, policy)
    return nn.remat(module, policy=named, prevent_cse=False, static_argnums=static_argnums)
