"""Where arrays live: the mesh, and the layout of parameters, optimizer state and batches on it.

Parameters carry logical axis names (`models.axes`); a config's `rules` map each name to mesh axes.
Flax replicates what it has no rule for without a word, so here an unknown name is an error.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta as flax_meta
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from muse_jax.specs import MeshSpec, Spec, SpecError
from muse_jax.training import trees

AXES = ("data", "fsdp", "tensor")
BATCH = "batch"  # the logical name of a batch's first axis
LAYERS = "layers"  # the logical name of the axis of stacked layers

Rules = Mapping[str, Any]


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over the devices, or over the first of them if it is smaller.

    The axes are of type Auto: under Explicit, the default of `jax.make_mesh`, Flax's Dense fails
    with sharded parameters.

    Raises:
      SpecError: if the devices are too few, don't divide, or are no block of the chips' torus.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [spec.data, spec.fsdp, spec.tensor]
    given = math.prod(size for size in sizes if size > 0)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise SpecError(f"mesh is {dict(zip(AXES, sizes, strict=True))}; sizes are at least 1, and at most one is -1.")
    if -1 in sizes:
        if len(devices) % given:
            raise SpecError(f"mesh axes of {given} devices don't divide the {len(devices)} present; change mesh.")
        sizes[sizes.index(-1)] = len(devices) // given
    count = math.prod(sizes)
    if count > len(devices):
        raise SpecError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {count} devices, but {len(devices)} are present; "
            "lower mesh.data, mesh.fsdp or mesh.tensor, or set one of them to -1."
        )
    return Mesh(_grid(sizes, spec.slices, devices[:count]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(sizes: Sequence[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor] in which neighbours are near on the chips' torus.

    An axis of the torus may be split over two of the mesh, which `jax.make_mesh` refuses on most TPUs: of v6e:16x16
    a mesh of 4x64 could not be made.
    """
    from jax.experimental import mesh_utils

    present = {getattr(device, "slice_index", 0) for device in devices}
    if sizes[0] % slices:
        raise SpecError(f"mesh.data {sizes[0]} is not a multiple of mesh.slices {slices}; change one of them.")
    if len(present) != slices:
        raise SpecError(
            f"mesh.slices is {slices}, but the {len(devices)} devices of the mesh are of {len(present)}; set "
            "mesh.slices to that, or one of mesh.data, mesh.fsdp and mesh.tensor to -1, which takes all devices."
        )
    within = (sizes[0] // slices, *sizes[1:])
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    except (AssertionError, ValueError) as error:  # whose text is a list of all devices
        raise SpecError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} takes {len(devices)} of the devices, which are no block of "
            "the chips' torus; set one of mesh.data, mesh.fsdp and mesh.tensor to -1, which takes all devices."
        ) from error


@contextlib.contextmanager
def layout(mesh: Mesh | AbstractMesh, rules: Rules) -> Iterator[None]:
    """What models are traced under, so that their constraints on activations take effect.

    With `with mesh:` instead of `jax.set_mesh`, Flax would drop every constraint silently.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield


def is_box(node: Any) -> bool:
    """Whether this is a Flax box that holds a parameter and its axis names."""
    return isinstance(node, flax_meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The nested dict of arrays without Flax's boxes."""
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


def axis_names(tree: Any) -> dict[str, tuple[str | None, ...]]:
    """{parameter name: its logical axis names}; None for each axis of a parameter without a box."""
    names = {}
    for name, leaf in trees.named_leaves(jax.tree.map(_Names, tree, is_leaf=is_box)).items():
        names[name] = leaf.names
    return names


class _Names:
    """An opaque leaf, since a tuple would be taken for a part of the tree."""

    def __init__(self, leaf: Any):
        value = leaf.value if is_box(leaf) else leaf
        self.names = tuple(getattr(leaf, "names", (None,) * np.ndim(value)))


def partition_spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], rules: Rules, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The mesh axes of one parameter. A mesh axis is used once: by the first logical axis that claims it.

    Raises:
      SpecError: for a logical axis that the rules lack, or a size that the mesh axes don't divide.
    """
    if len(axes) != len(shape):
        raise SpecError(f"{name} has shape {tuple(shape)} but the axis names {tuple(axes)}.")
    used: set[str] = set()
    spec: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise SpecError(
                f"{name} has the logical axis {axis!r}, which config.rules lacks (it has {', '.join(sorted(rules))}); "
                f"add rules.{axis}: a mesh axis, several, or None to replicate."
            )
        wanted = rules[axis] if axis is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
        free = tuple(a for a in wanted if a not in used and mesh.shape[a] > 1)
        ways = math.prod(mesh.shape[a] for a in free)
        if size % ways:
            raise SpecError(
                f"{name} has {size} along {axis!r}, which mesh axes {', '.join(free)} ({ways} ways) don't divide; "
                f"change mesh or rules.{axis}."
            )
        used.update(free)
        spec.append(None if not free else free[0] if len(free) == 1 else free)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def param_specs(boxes: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> dict[str, PartitionSpec]:
    """{name: PartitionSpec} of boxed parameters (arrays or shapes)."""
    axes = axis_names(boxes)
    leaves = trees.named_leaves(unbox(boxes))
    return {name: partition_spec(name, leaf.shape, axes[name], rules, mesh) for name, leaf in leaves.items()}


def optimizer_specs(state: Any, params: Any, specs: Mapping[str, PartitionSpec]) -> dict[str, PartitionSpec]:
    """{name: PartitionSpec} of the leaves of an optimizer's state.

    A state leaf belongs to the parameter whose name ends its own. With the parameter's shape it gets
    the parameter's spec; with one dimension gone (Adafactor's rows and columns) the spec without that
    dimension; otherwise it is replicated.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.named_leaves(params).items()}
    found = {}
    for name, leaf in trees.named_leaves(state).items():
        parts = name.split("/")
        owners = ("/".join(parts[i:]) for i in range(len(parts)))
        owner = next((o for o in owners if o in shapes), None)
        found[name] = PartitionSpec()
        if owner is not None:
            found[name] = _state_spec(parts, tuple(leaf.shape), shapes[owner], specs[owner])
    return found


def _state_spec(path: Sequence[str], shape: tuple, param: tuple, spec: PartitionSpec) -> PartitionSpec:
    if shape == param:
        return spec
    full = tuple(spec) + (None,) * (len(param) - len(spec))
    gone = [axis for axis in range(len(param)) if shape == param[:axis] + param[axis + 1 :]]
    if not gone:
        return PartitionSpec()
    # Where two dimensions have the same size, optax drops the later one of the two from the rows'
    # statistics and the earlier one from the columns'.
    axis = gone[-1] if "v_row" in path else gone[0]
    kept = list(full[:axis] + full[axis + 1 :])
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def shardings(tree: Any, specs: Mapping[str, PartitionSpec], mesh: Mesh | AbstractMesh) -> Any:
    """A tree like `tree` of NamedShardings."""
    return trees.map_named(lambda name, _: NamedSharding(mesh, specs[name]), tree)


def batch_sharding(mesh: Mesh | AbstractMesh, rules: Rules) -> NamedSharding:
    """Examples are split over the mesh axes of rules["batch"], by default data and fsdp."""
    axes = rules.get(BATCH, ("data", "fsdp"))
    return NamedSharding(mesh, PartitionSpec(axes if isinstance(axes, str) else tuple(axes or ())))


def check_batch(spec: Spec, mesh: Mesh | AbstractMesh) -> None:
    """Raises SpecError if the devices don't divide a micro-batch."""
    parts = batch_sharding(mesh, spec.rules).spec[0] or ()
    ways = math.prod(mesh.shape[a] for a in ((parts,) if isinstance(parts, str) else parts))
    micro = spec.train.batch_size // spec.optimizer.accumulate
    if micro % ways:
        parts = spec.optimizer.accumulate
        accumulated = f" in {parts} micro-batches of {micro}" if parts > 1 else ""
        multiple = ways * parts
        fitting = max(1, round(spec.train.batch_size / multiple)) * multiple
        raise SpecError(
            f"train.batch_size {spec.train.batch_size}{accumulated} can't be divided over {ways} devices "
            f"(mesh {dict(mesh.shape)}); set train.batch_size to a multiple of {multiple}, such as {fitting}, "
            "or lower mesh.data."
        )


def process_part(sharding: NamedSharding, size: int) -> tuple[int, int]:
    """(index, count): this process holds the index-th of `count` equal parts of the `size` examples of a batch.

    Processes that share a part, as where the axis `tensor` spans them, have the same index.

    Raises:
      SpecError: if the mesh has no device of some process, or the processes' parts overlap or differ in size.
    """
    if jax.process_count() == 1:
        return 0, 1
    held: dict[int, set[int]] = {}
    for device, (rows, *_) in sharding.devices_indices_map((size,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(size)))
    idle = sorted(set(range(jax.process_count())) - set(held))
    if idle:
        mesh = sharding.mesh
        raise SpecError(
            f"mesh {dict(mesh.shape)} takes {mesh.size} of the {jax.device_count()} devices and none of "
            f"{'process' if len(idle) == 1 else 'processes'} {', '.join(map(str, idle))}; set one of mesh.data, "
            "mesh.fsdp and mesh.tensor to -1, which takes all devices."
        )
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != size:
        raise SpecError(
            f"the processes' parts of a batch of {size} are {[len(part) for part in parts]} examples, which is no "
            "division into equal parts; change mesh so that each process holds whole shards of the batch."
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def put(tree: Any, sharding: Any) -> Any:
    """Host arrays, of which each process holds its own part, as global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def take(array: jax.Array) -> np.ndarray:
    """This process's rows of a global array that is split by its first axis: the inverse of `put`."""
    if jax.process_count() == 1:
        return np.asarray(array)
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def place(tree: Any, shardings: Any) -> Any:
    """Arrays, or tensors still in a file, on the devices; of a file each process reads what its devices hold.

    Args:
      tree: of NumPy or jax arrays, or of anything with `shape` and `dtype` that an index reads a part of.
      shardings: a tree like it.

    Raises:
      SpecError: for a tensor whose `fingerprint` is not that of what was read.
    """
    placed = jax.tree.map(_place, tree, shardings)
    leaves = trees.named_leaves(placed)
    expected = {name: getattr(leaf, "fingerprint", None) for name, leaf in trees.named_leaves(tree).items()}
    known = {name: value for name, value in expected.items() if value is not None}
    for name, found in trees.fingerprints({name: leaves[name] for name in known}).items():
        if found != known[name]:
            raise SpecError(
                f"{name} isn't what was written: its fingerprint is {found}, expected {known[name]}; "
                "import the weights again."
            )
    return placed


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, np.ndarray | jax.Array | np.generic):
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf)  # device_put would send it around to compare it
    read: dict[Any, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop, s.step) for s in index)
        if key not in read:
            read[key] = leaf[index]
        return read[key]

    return jax.make_array_from_callback(tuple(leaf.shape), sharding, part)
