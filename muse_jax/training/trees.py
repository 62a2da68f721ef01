"""Names and fingerprints of the leaves of a nested dict of arrays.

A leaf's name is its path joined by "/", as in the safetensors files; the optimizer's state, whose
tree has tuples and named tuples too, gets names in the same way.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)
_MIX = ((16, np.uint32(0x85EBCA6B)), (13, np.uint32(0xC2B2AE35)))
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def named_leaves(tree: Any) -> dict[str, Any]:
    """{name: leaf} of any tree, in the order of the tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have these names; the inverse of `named_leaves` on nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def refill(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with each leaf replaced by the one of its name."""
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, [leaves[name] for name in named_leaves(tree)])


def map_named(function: Any, tree: Any) -> Any:
    """`tree` with each leaf replaced by function(name, leaf)."""
    return refill(tree, {name: function(name, leaf) for name, leaf in named_leaves(tree).items()})


def describe(tree: Any) -> dict[str, tuple[list[int], str]]:
    """{name: (shape, dtype)}: what is compared before anything is read."""
    return {name: (list(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in named_leaves(tree).items()}


def fingerprint(leaf: jax.Array, start: Any = None, whole: Any = None) -> jax.Array:
    """A uint32 of an array's bits: the sum over elements of mix(bits xor index * golden) modulo 2**32.

    Integer addition is associative, so no mesh and no order of summation changes the value. `mix` is
    MurmurHash3's finalizer, a bijection: a change of one element always shows, and one of many (all
    values doubled, say, which weights linear in the index can miss) but for a chance of 2**-32.
    Jit-able; see `fingerprint_numpy`.

    Args:
      leaf: the array, or a block of one: the sum modulo 2**32 over all blocks is that of the whole.
      start: of a block, where it begins along each axis of the whole array.
      whole: of a block, the whole array's shape.
    """
    whole = leaf.shape if whole is None else whole
    start = [0] * leaf.ndim if start is None else start
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(_UNSIGNED[leaf.dtype.itemsize]))
    if bits.dtype.itemsize == 8:
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)  # a last axis of two
    bits = bits.astype(jnp.uint32)
    words = bits.shape[leaf.ndim :]  # two to an element of 8 bytes
    start, whole = [*start, *(0 for _ in words)], [*whole, *words]
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + jnp.uint32(start[axis])
        index = index + along * np.uint32(stride % 2**32)
        stride *= whole[axis]
    mixed = bits ^ (index * _GOLDEN)
    for shift, factor in _MIX:
        mixed = (mixed ^ (mixed >> shift)) * factor
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def fingerprint_numpy(leaf: np.ndarray, first: int = 0) -> int:
    """`fingerprint` of an array on the host.

    Args:
      leaf: the array, or consecutive elements of one: their sum modulo 2**32 is that of the whole.
      first: index of the first element in the whole array.
    """
    leaf = np.ascontiguousarray(leaf)
    bits = leaf.reshape(-1).view(_UNSIGNED[min(leaf.dtype.itemsize, 4)]).astype(np.uint32, copy=False)
    mixed = np.arange(bits.size, dtype=np.uint32)
    words = bits.size // max(leaf.size, 1)  # two to an element of 8 bytes
    mixed += np.uint32(first * words % 2**32)
    mixed *= _GOLDEN
    mixed ^= bits
    for shift, factor in _MIX:
        mixed ^= mixed >> shift
        mixed *= factor
    mixed ^= mixed >> 16
    return int(np.sum(mixed, dtype=np.uint32))


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: fingerprint(leaf) for name, leaf in leaves.items()}


def fingerprints(tree: Any) -> dict[str, int]:
    """{name: fingerprint} of arrays: on the host if that is where they are, else in one compiled program."""
    leaves = named_leaves(tree)
    if all(_on_host(leaf) for leaf in leaves.values()):  # saves a compilation
        return {name: fingerprint_numpy(np.asarray(leaf)) for name, leaf in leaves.items()}
    return {name: int(value) for name, value in jax.device_get(_fingerprints(leaves)).items()}


def _on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())
