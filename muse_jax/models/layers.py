"""Layers that the transformers are put together from. Parameters carry logical axis names."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from muse_jax.models import axes


def kernel_init(names: Sequence[str | None], fan_in_axes: Sequence[int], scale: float = 1.0):
    """Truncated normal of variance scale / fan-in, with the names of the kernel's axes."""
    out_axes = tuple(i for i in range(len(names)) if i not in fan_in_axes)
    init = nn.initializers.variance_scaling(
        scale, "fan_in", "truncated_normal", in_axis=tuple(fan_in_axes), out_axis=out_axes
    )
    return nn.with_logical_partitioning(init, tuple(names))


def product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"], dtype: Any = None) -> Float[Array, "*b o"]:
    """``x @ kernel``, as a product of two matrices, summed and returned in `dtype` (by default theirs).

    With the leading axes flattened, the kernel's gradient contracts one axis instead of several,
    which XLA's CPU backend does at twice the rate or more.

    Under ``jax.default_matmul_precision("bfloat16")`` factors in float32 are rounded to bfloat16 and summed in
    float32, here and in the gradients. TPUs do so by themselves; XLA's CPU backend ignores the setting.
    """
    rounds = jax.config.jax_default_matmul_precision == "bfloat16" and x.dtype == kernel.dtype == jnp.float32
    dot = _rounded_dot if rounds else functools.partial(jnp.dot, preferred_element_type=dtype)
    return dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _rounded_dot(x: Any, kernel: Any) -> Any:
    return _rounded_dot_forward(x, kernel)[0]


def _rounded_dot_forward(x: Any, kernel: Any) -> tuple[Any, tuple[Any, Any]]:
    rounded = (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    return _dot(*rounded), rounded


def _rounded_dot_backward(rounded: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
    x, kernel = rounded
    cotangent = cotangent.astype(jnp.bfloat16)
    return _dot(cotangent, kernel.T), _dot(x.T, cotangent)


_rounded_dot.defvjp(_rounded_dot_forward, _rounded_dot_backward)


def _dot(x: Float[Array, "m i"], y: Float[Array, "i n"]) -> Float[Array, "m n"]:
    """``x @ y`` of matrices in bfloat16, summed in float32.

    XLA's CPU backend has products in bfloat16, at nearly twice the rate, of matrices that lie in rows; others it
    widens to float32 first. So a transposed factor is written out, which costs less than it gains.
    """
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return jax.lax.platform_dependent(x, y, cpu=lambda x, y: _in_rows(dot(_in_rows(x), _in_rows(y))), default=dot)


def _in_rows(x: Any) -> Any:
    return layout.with_layout_constraint(x, layout.Layout((0, 1)))


def on_many_devices() -> bool:
    """Whether what is traced is split over devices."""
    return bool(nn.get_logical_axis_rules()) and jax.sharding.get_abstract_mesh().size > 1


def gathered(kernel: Any, names: Sequence[str | None], dtype: Any, ahead: Any = None) -> Any:
    """The kernel in `dtype`, whole along the mesh axes that split the batch, as it is multiplied.

    Parameters are stored split over those axes too. Said here, each kernel travels once a step, in the
    dtype of the products, and is kept for the backward pass; its gradient comes back split as the kernel
    is stored, so that chips sum and share it out in one exchange. Left to XLA, what is split may be the
    activations instead.

    Args:
      names: the logical axes of the kernel.
      ahead: the whole kernel where it was gathered before, as a constant; the gradient is `kernel`'s all the same.
    """
    kernel = kernel.astype(dtype)
    if not on_many_devices():
        return kernel
    return _gather(kernel, ahead, _stored(names), _kept(names))


def is_gathered(names: Sequence[str | None]) -> bool:
    """Whether kernels with these logical axes are stored on more devices than they are multiplied on."""
    return on_many_devices() and _ways(_stored(names)) > _ways(_kept(names))


def is_split(name: str) -> bool:
    """Whether kernels stay split by this logical axis where they are multiplied, so that devices sum up their parts."""
    return on_many_devices() and _ways(_kept((name,))) > 1


def looked_up(table: Float[Array, "v i"], ids: Int[Array, "b n"], name: str) -> Float[Array, "b n i"]:
    """``table[ids]`` of a table that is stored split by its width, the logical axis `name`.

    Each device looks up its part of the width for the examples of all that have the other parts, and they exchange
    what they found; so do gradients. Left to XLA, each sums up a gradient of the whole table, and these are exchanged.
    """
    if not on_many_devices():
        return table[ids]
    width, batch = (_mesh_axes(_stored((axis,))[0]) for axis in (name, axes.BATCH))
    batch = tuple(axis for axis in batch if axis not in width)
    found = jax.lax.with_sharding_constraint(table[ids], PartitionSpec(batch or None, None, width or None))
    return nn.with_logical_constraint(found, (axes.BATCH, None, None))


@contextlib.contextmanager
def ruled(rules: Mapping[str, Any]) -> Iterator[None]:
    """Other rules for what is traced within; where there are none, on one device, there are none within either."""
    if not nn.get_logical_axis_rules():
        yield
        return
    with nn.logical_axis_rules(tuple(rules.items())):
        yield


def _stored(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of what has these logical axes. Each is used once, by the first of them that claims it."""
    rules = dict(nn.get_logical_axis_rules())
    return nn.logical_to_mesh_axes(names, [(name, rules.get(name)) for name in names if name is not None])


def _kept(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes by which what has these logical axes stays split where the batch meets it."""
    batch = _mesh_axes(_stored((axes.BATCH,))[0])
    return PartitionSpec(*(tuple(a for a in _mesh_axes(entry) if a not in batch) or None for entry in _stored(names)))


def _ways(split: PartitionSpec) -> int:
    """Among how many devices something is split."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for entry in split for axis in _mesh_axes(entry))


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(kernel: Any, ahead: Any, stored: PartitionSpec, whole: PartitionSpec) -> Any:
    return jax.lax.with_sharding_constraint(kernel, whole) if ahead is None else ahead


def _gather_forward(kernel: Any, ahead: Any, stored: PartitionSpec, whole: PartitionSpec) -> tuple[Any, None]:
    return _gather(kernel, ahead, stored, whole), None


def _gather_backward(stored: PartitionSpec, whole: PartitionSpec, _: None, cotangent: Any) -> tuple[Any, None]:
    return jax.lax.with_sharding_constraint(cotangent, stored), None


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def awaited(x: Float[Array, "*b i"]) -> tuple[Float[Array, "*b i"], Float[Array, ""]]:
    """`x` as it is, and a token to hand to later `Dense` layers.

    Backward, what made `x` waits until the gradients of those layers' kernels are where they are stored; no value
    changes. XLA's scheduler leaves all gradients of kernels, and so their exchange between chips, to the end of a
    layer's backward pass, where little is left to compute meanwhile.
    """
    return x, jnp.zeros(())


def _awaited_forward(x: Any) -> tuple[Any, None]:
    return awaited(x), None


def _awaited_backward(_: None, cotangents: Any) -> tuple[Any]:
    x, zero = jax.lax.optimization_barrier(cotangents)
    return (x + zero.astype(x.dtype),)  # or XLA would drop it from the barrier


awaited.defvjp(_awaited_forward, _awaited_backward)


@jax.custom_vjp
def _awaiting(kernel: Any, token: Any) -> Any:
    return kernel


def _awaiting_forward(kernel: Any, token: Any) -> tuple[Any, Any]:
    return kernel, token


def _awaiting_backward(token: Any, cotangent: Any) -> tuple[Any, Any]:
    return jax.lax.optimization_barrier((cotangent, token))


_awaiting.defvjp(_awaiting_forward, _awaiting_backward)


class Dense(nn.Module):
    """``x @ kernel`` over the last axis; no bias unless asked for. For the token see `awaited`."""

    features: int
    names: tuple[str, str]
    use_bias: bool = False
    scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"], token: Float[Array, ""] | None = None) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", kernel_init(self.names, (0,), self.scale), (x.shape[-1], self.features))
        kernel = kernel if token is None else _awaiting(kernel, token)
        y = product(x.astype(self.dtype), gathered(kernel, self.names, self.dtype))
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.names[1:])
            y = y + self.param("bias", init, (self.features,)).astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in float32 (Zhang & Sennrich 2019)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, (axes.NORM,))
        scale = self.param("scale", init, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype)


class HeadProjection(nn.Module):
    """Projects the width to heads: ``[*b, width] -> [*b, heads, head_dim]``. For `ahead` see `gathered`."""

    NAMES = (axes.EMBED, axes.HEADS, axes.HEAD_DIM)  # of the kernel's axes

    heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"], ahead: Float[Array, "i h d"] | None = None) -> Float[Array, "*b h d"]:
        kernel = self.param("kernel", kernel_init(self.NAMES, (0,)), (x.shape[-1], self.heads, self.head_dim))
        kernel = gathered(kernel, self.NAMES, self.dtype, ahead)
        flat = product(x.astype(self.dtype), kernel.reshape(x.shape[-1], -1))
        return flat.reshape(*x.shape[:-1], self.heads, self.head_dim)


class OutProjection(nn.Module):
    """Joins the heads: ``[*b, heads, head_dim] -> [*b, width]``."""

    features: int
    scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b h d"]) -> Float[Array, "*b o"]:
        names = (axes.HEADS, axes.HEAD_DIM, axes.EMBED)
        kernel = self.param("kernel", kernel_init(names, (0, 1), self.scale), (*x.shape[-2:], self.features))
        kernel = gathered(kernel, names, self.dtype)
        flat = x.astype(self.dtype).reshape(*x.shape[:-2], -1)
        return product(flat, kernel.reshape(-1, self.features))


def attend(
    q: Float[Array, "*b n h d"],
    k: Float[Array, "*b m h d"],
    v: Float[Array, "*b m h d"],
    mask: Bool[Array, "*b m"] | None = None,
    bias: Float[Array, "h n m"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "*b n h d"]:
    """Scaled dot-product attention, with a bias on the scores if there is one; softmax in float32.

    A query that sees no key at all gets zeros: with the whole text masked, cross-attention vanishes
    and "attention is then self-attention alone" (Muse, section 2.7).

    Args:
      implementation: "xla", or "cudnn", its fused kernel, which keeps scores out of a GPU's memory.
    """
    if implementation == "cudnn":
        out = _attend_fused(q, k, v, mask, bias)
    else:
        out = _attend_plainly(q, k, v, mask, bias)
    if mask is not None:
        out = jnp.where(jnp.any(mask, axis=-1)[..., None, None, None], out, 0)
    return out


def _attend_plainly(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
    scores = jnp.einsum("...qhd,...khd->...hqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask[..., None, None, :], scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def _attend_fused(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    if mask is not None:  # where a query sees nothing, let it see all rather than divide by 0
        mask = (mask | ~jnp.any(mask, axis=-1, keepdims=True)).reshape(-1, 1, 1, mask.shape[-1])
    bias = None if bias is None else bias[None].astype(q.dtype)
    return jax.nn.dot_product_attention(*flat, bias=bias, mask=mask, implementation="cudnn").reshape(q.shape)


def to_blocks(x: Float[Array, "b n *r"], grid: tuple[int, int], block: tuple[int, int]) -> Float[Array, "b k p *r"]:
    """Raster-ordered tokens to ``[b, blocks, positions in the block, ...]``."""
    (rows, cols), (p, q) = grid, block
    x = x.reshape(x.shape[0], rows // p, p, cols // q, q, *x.shape[2:])
    x = x.swapaxes(2, 3)
    return x.reshape(x.shape[0], (rows // p) * (cols // q), p * q, *x.shape[5:])


def from_blocks(x: Float[Array, "b k p *r"], grid: tuple[int, int], block: tuple[int, int]) -> Float[Array, "b n *r"]:
    """The inverse of `to_blocks`."""
    (rows, cols), (p, q) = grid, block
    x = x.reshape(x.shape[0], rows // p, cols // q, p, q, *x.shape[3:])
    return x.swapaxes(2, 3).reshape(x.shape[0], rows * cols, *x.shape[5:])


def multi_axis_attend(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    grid: tuple[int, int],
    block: tuple[int, int],
    biases: tuple[Float[Array, "g p p"], Float[Array, "g k k"]] | tuple[None, None] = (None, None),
    implementation: str = "xla",
) -> Float[Array, "b n h d"]:
    """Multi-axis attention (HiT, Zhao et al. 2021, section 3.1).

    The first half of the heads attends within blocks, the second half across blocks, among the
    tokens at the same position of their block (a dilated grid); `biases` are for the one and the other.
    """
    half = q.shape[2] // 2
    q, k, v = (to_blocks(x, grid, block) for x in (q, k, v))
    within = (x[..., :half, :] for x in (q, k, v))
    across = (x[..., half:, :].swapaxes(1, 2) for x in (q, k, v))
    within = attend(*within, bias=biases[0], implementation=implementation)
    across = attend(*across, bias=biases[1], implementation=implementation).swapaxes(1, 2)
    return from_blocks(jnp.concatenate([within, across], axis=-2), grid, block)


class RelativeBias(nn.Module):
    """A learned number for each head and 2D offset between places of two grids; zero at the start.

    Not in Muse, which has absolute positions only. What a shape looks like does not depend on where
    it is, and with offsets a small model need not learn it at every place anew. The grids lie on the
    same picture: with a finer one for the queries, several of them share a key's square.
    """

    heads: int
    queries: tuple[int, int]
    keys: tuple[int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "h n m"]:
        rows, columns = (offsets_chosen(*sides) for sides in zip(self.queries, self.keys, strict=True))
        offsets = (rows.shape[-1], columns.shape[-1])
        init = nn.with_logical_partitioning(nn.initializers.zeros, (axes.HEADS, axes.BUCKETS))
        table = self.param("table", init, (self.heads, math.prod(offsets))).reshape(self.heads, *offsets)
        # Products, not a lookup: the gradient is products too, where a lookup's is a slow scatter.
        bias = jnp.einsum("hyx,qky,pwx->hqpkw", table, rows, columns, precision="highest")
        return bias.reshape(self.heads, math.prod(self.queries), math.prod(self.keys))


def offsets_chosen(queries: int, keys: int) -> Float[np.ndarray, "q k o"]:
    """One-hot: which offset lies between a query's and a key's place on one side of the picture.

    >>> offsets_chosen(2, 2).argmax(-1).tolist()  # offsets -1, 0, 1
    [[1, 0], [2, 1]]
    >>> offsets_chosen(4, 2).argmax(-1).tolist()  # -2 to 3, in steps of the finer grid
    [[2, 0], [3, 1], [4, 2], [5, 3]]
    """
    steps = math.lcm(queries, keys)
    offset = np.arange(queries)[:, None] * (steps // queries) - np.arange(keys)[None, :] * (steps // keys)
    offset = offset - offset.min()
    return np.eye(offset.max() + 1, dtype=np.float32)[offset]


class SelfAttention(nn.Module):
    """Self-attention; with a `block`, multi-axis over the `grid`.

    `ahead` has the kernels of the `PROJECTIONS`, one after another, where they were gathered before; see `gathered`.
    """

    PROJECTIONS = ("query", "key", "value")

    heads: int
    grid: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    qk_norm: bool = False
    relative: bool = False
    out_scale: float = 1.0
    implementation: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n i"], ahead: Float[Array, "3 i h d"] | None = None) -> Float[Array, "b n i"]:
        q, k, v = (
            HeadProjection(self.heads, x.shape[-1] // self.heads, self.dtype, name=name)(x, kernel)
            for name, kernel in zip(self.PROJECTIONS, (None,) * 3 if ahead is None else ahead, strict=True)
        )
        if self.qk_norm:
            q, k = (RMSNorm(name=f"{n}_norm")(y) for n, y in (("query", q), ("key", k)))
        if self.block is None:
            bias = self._bias(x.shape[1]) if self.relative else None
            out = attend(q, k, v, bias=bias, implementation=self.implementation)
        else:
            biases = self._multi_axis_biases()
            out = multi_axis_attend(q, k, v, self.grid, self.block, biases, self.implementation)
        return OutProjection(x.shape[-1], self.out_scale, self.dtype, name="out")(out)

    def _bias(self, length: int) -> Float[Array, "h n n"]:
        """Of the grid's places; tokens after them, such as a class, have no place."""
        bias = RelativeBias(self.heads, self.grid, self.grid, name="bias")()
        beyond = (0, length - bias.shape[-1])
        return jnp.pad(bias, ((0, 0), beyond, beyond))

    def _multi_axis_biases(self) -> tuple[Any, Any]:
        if not self.relative:
            return None, None
        blocks = tuple(side // part for side, part in zip(self.grid, self.block, strict=True))
        half = self.heads // 2
        within, across = ((side, f"bias_{name}") for side, name in ((self.block, "within"), (blocks, "across")))
        return tuple(RelativeBias(half, side, side, name=name)() for side, name in (within, across))


class CrossAttention(nn.Module):
    """Attention to keys and values that were computed before.

    With `grids`, of the queries and of the first keys, it has a `RelativeBias` between these: a place
    finds what is known about it, here low-resolution tokens. The other keys, the text, have no place.
    """

    heads: int
    qk_norm: bool = False
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None
    out_scale: float = 1.0
    implementation: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n i"],
        keys: Float[Array, "b m h d"],
        values: Float[Array, "b m h d"],
        mask: Bool[Array, "b m"],
    ) -> Float[Array, "b n i"]:
        q = HeadProjection(self.heads, x.shape[-1] // self.heads, self.dtype, name="query")(x)
        if self.qk_norm:
            q = RMSNorm(name="query_norm")(q)
        bias = None
        if self.grids is not None:
            bias = RelativeBias(self.heads, *self.grids, name="bias")()
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, keys.shape[1] - bias.shape[-1])))
        out = attend(q, keys, values, mask, bias, self.implementation)
        return OutProjection(x.shape[-1], self.out_scale, self.dtype, name="out")(out)


class MLP(nn.Module):
    """Two dense layers with GELU between. For the token see `awaited`."""

    width: int
    out_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"], token: Float[Array, ""] | None = None) -> Float[Array, "*b i"]:
        hidden = nn.gelu(Dense(self.width, (axes.EMBED, axes.MLP), dtype=self.dtype, name="in")(x, token))
        out = Dense(x.shape[-1], (axes.MLP, axes.EMBED), scale=self.out_scale, dtype=self.dtype, name="out")
        return out(hidden, token)
