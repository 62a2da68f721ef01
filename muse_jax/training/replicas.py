"""Silent faults of many devices: copies that no longer agree, and copies that nobody asked for.

What is replicated over a mesh axis is the same bits on every device along it, or a device, a link or a
compiler has erred. Each device fingerprints what it holds (`trees.fingerprint`, with the indices of the
whole leaf), the fingerprints of a leaf's parts are added up, and the sums of all copies are compared.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from muse_jax.specs import SpecError
from muse_jax.training import trees

MOST = 1.1  # bytes on a device over what is expected
Items = Mapping[str, Mapping[str, Any]]
Bytes = Mapping[str, float | int]


class ReplicaError(RuntimeError):
    """Devices that should hold the same bits don't."""


def fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """{name: fingerprint} of arrays, the same on any mesh; all copies of each are compared.

    Raises:
      ReplicaError: naming the leaves and the devices that don't hold what most of their copies do.
    """
    leaves = dict(leaves)
    mesh = _mesh(leaves)
    if mesh is None:
        return trees.fingerprints(leaves)
    specs = {name: leaf.sharding.spec for name, leaf in leaves.items()}
    found = jax.device_get(_compiled(mesh, tuple(specs.items()))(leaves))
    wrong = {name: where for name, prints in found.items() if (where := _odd(prints, mesh))}
    if wrong:
        shown = "; ".join(f"{name} on {', '.join(where)}" for name, where in list(wrong.items())[:5])
        more = f" and {len(wrong) - 5} more leaves" if len(wrong) > 5 else ""
        raise ReplicaError(
            f"replicas hold different bits, of {len(leaves)} leaves these: {shown}{more}. A device computes or "
            "stores wrongly; keep it out and start again from the newest checkpoint, which was compared before "
            "it was written."
        )
    return {name: int(prints.flat[0]) for name, prints in found.items()}


def check_same(leaves: Mapping[str, jax.Array], others: Mapping[str, jax.Array], step: int) -> None:
    """Raises ReplicaError, naming leaves, if a step that was made twice gave different bits.

    Args:
      leaves, others: what it gave, and what it gave the other time.
      step: that was made.
    """
    found, expected = fingerprints(leaves), fingerprints(others)
    wrong = [name for name, value in found.items() if value != expected[name]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ReplicaError(
            f"step {step}, made twice from the same state and batch, gave different bits in {', '.join(wrong[:5])}"
            f"{more}, of {len(found)} leaves. A device computes wrongly, or the program isn't deterministic (on GPUs "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true makes it so; train.replay_every=0 makes no step twice). Start "
            "again from the newest checkpoint, on other devices if it recurs."
        )


def check_bytes(items: Items, expected: Items, mesh: Mesh, even: float) -> None:
    """Raises SpecError, naming leaves, where parameters or optimizer take too much of a device's memory.

    Two things are expected: at most `MOST` times what the config's rules make of each leaf, the optimizer's
    leaves of a parameter's shape being split as it is; and, if `even` isn't 0, at most `even` times an even
    split of everything over the mesh axes fsdp and tensor, which tells of rules that split too little.

    Args:
      items: {"params": {name: array}, "optimizer": ...}; each item is held to it by itself.
      expected: the same with ShapeDtypeStructs that have shardings.
      mesh: of the run.
      even: the config's mesh.most_bytes.
    """
    parts: dict[tuple[int, ...], int] = {}
    for leaf in expected["params"].values():
        parts[leaf.shape] = max(parts.get(leaf.shape, 0), math.prod(leaf.sharding.shard_shape(leaf.shape)))
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for item, leaves in items.items():
        held = {name: _held(leaf) for name, leaf in leaves.items()}
        asked = {
            name: min(parts.get(leaf.shape, leaf.size), math.prod(leaf.sharding.shard_shape(leaf.shape)))
            * leaf.dtype.itemsize
            for name, leaf in expected[item].items()
        }
        _check(item, held, asked, MOST, "what config.rules ask for", leaves)
        if even:
            split = {name: leaf.nbytes / ways for name, leaf in leaves.items()}
            what = f"an even split over {ways} devices (mesh {dict(mesh.shape)}, mesh.most_bytes {even:g})"
            _check(item, held, split, even, what, leaves)


def _check(item: str, held: Bytes, expected: Bytes, most: float, what: str, leaves: Mapping[str, Any]) -> None:
    total, wanted = sum(held.values()), sum(expected.values())
    if total > most * wanted:
        worst = sorted((n for n in held if held[n] > expected[n]), key=lambda name: expected[name] - held[name])[:5]
        listed = "; ".join(f"{n} {list(leaves[n].shape)}: {held[n]:.0f} instead of {expected[n]:.0f}" for n in worst)
        raise SpecError(
            f"{item} take {total:.0f} bytes on a device, {total / wanted:.2f} times {what}. Most of it is of "
            f"{listed}. Split them over more mesh axes in config.rules, or change mesh."
        )


def _held(leaf: jax.Array) -> int:
    """Bytes on the device, of this process's, that holds the most."""
    found: dict[jax.Device, int] = {}
    for shard in leaf.addressable_shards:
        found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return max(found.values())


def _mesh(leaves: Mapping[str, jax.Array]) -> Mesh | None:
    """The mesh of leaves that lie on several devices."""
    shards = [leaf.sharding for leaf in leaves.values() if isinstance(leaf, jax.Array)]
    named = [shard for shard in shards if isinstance(shard, NamedSharding) and shard.mesh.size > 1]
    return named[0].mesh if named else None


@functools.lru_cache(maxsize=8)
def _compiled(mesh: Mesh, specs: tuple[tuple[str, PartitionSpec], ...]) -> Any:
    """The function {name: leaf} -> {name: fingerprints by each device's whole copy, in the mesh's shape}."""

    def local(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: _of_copy(leaves[name], spec, mesh) for name, spec in specs}

    here = PartitionSpec(*mesh.axis_names)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(dict(specs),), out_specs=here, check_vma=False)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _of_copy(part: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """The fingerprint of the copy that this device has a part of; one number, with an axis for each of the mesh's."""
    axes = [() if axis is None else (axis,) if isinstance(axis, str) else tuple(axis) for axis in spec]
    axes += [()] * (part.ndim - len(axes))
    start = [jax.lax.axis_index(names) * size if names else 0 for names, size in zip(axes, part.shape, strict=True)]
    whole = [size * math.prod(mesh.shape[n] for n in names) for names, size in zip(axes, part.shape, strict=True)]
    value = trees.fingerprint(part, start, whole)
    split = tuple(name for names in axes for name in names)
    value = jax.lax.psum(value, split) if split else value
    return jnp.reshape(value, (1,) * len(mesh.axis_names))


def _odd(prints: np.ndarray, mesh: Mesh) -> list[str]:
    """The devices whose copy isn't what most hold, in words; all of them where there is no majority."""
    values, counts = np.unique(prints, return_counts=True)
    if len(values) == 1:
        return []
    most = values[counts == counts.max()]
    odd = prints != most[0] if len(most) == 1 else np.ones_like(prints, bool)
    return [f"device {device.id} (process {device.process_index})" for device in mesh.devices[odd]]
