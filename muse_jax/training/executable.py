"""Compiled programs: what one is known by, and whether the devices have room for it.

A run that goes on gives the bits of one that was never stopped if the same program computes both. So each checkpoint
has the identity of the step that led to it, and the run says where its own differs. Room is looked for before the
first step: the evaluation may need more than a step, and is otherwise run for the first time hours later.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jaxlib
from jax.sharding import Mesh

from muse_jax.training.reading import brief

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the compiler, in the environment


class DeviceMemoryError(RuntimeError):
    """A run needs more memory than a device has."""


def identity(lowered: Any, options: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """What a compiled program's bits depend on besides its arguments, as JSON.

    Args:
      lowered: the program as it is handed to the compiler; "program" is a hash of its text, which doesn't say where in
        the sources anything is from. The compiler's own text isn't the same each time, on several devices.
      options: of the compiler, for this program.
      mesh: of the run.
    """
    return {
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "options": dict(options),
        **{name: os.environ.get(name, "") for name in FLAGS},
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two identities, in words; "" if nothing does.

    >>> difference({"program": "a", "jaxlib": "0.10.1", "XLA_FLAGS": ""}, {"program": "b", "jaxlib": "0.12.0"})
    'jaxlib 0.10.1 -> 0.12.0'
    >>> difference({"program": "a"}, {"program": "b"})
    'the program'
    """
    changed = [key for key in new if key in old and old[key] != new[key]]
    named = [f"{key} {old[key] or 'none'} -> {new[key] or 'none'}" for key in changed if key != "program"]
    return ", ".join(named) or ("the program" if changed else "")


def memory(compiled: Any) -> dict[str, int]:
    """Bytes that a program takes of a device; results in the place of donated arguments count once."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "results": max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
        "code": found.generated_code_size_in_bytes,
    }


def device_bytes(tree: Any) -> int:
    """Of a tree of arrays, or of ShapeDtypeStructs with shardings, on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def limit(devices: Iterable[Any]) -> int:
    """Bytes that a run may take of the smallest of some devices; 0 where the backend doesn't say, as on CPUs."""
    return min(((device.memory_stats() or {}).get("bytes_limit", 0) for device in devices), default=0)


def check_room(what: str, parts: Mapping[str, int], mesh: Mesh, remedy: str) -> None:
    """Raises DeviceMemoryError, with the remedy, if parts of these bytes don't fit into a device together."""
    most, total = limit(mesh.local_devices), sum(parts.values())
    if 0 < most < total:
        listed = ", ".join(f"{_mib(size)} {part}" for part, size in parts.items() if size)
        raise DeviceMemoryError(
            f"{what} takes at least {_mib(total)} of a device ({listed}), and a run may take {_mib(most)} "
            f"of one. {remedy}"
        )


def fitting(what: str, compile_it: Callable[[], Any], beside: int, mesh: Mesh) -> Any:
    """A compiled program, if the devices have room for it.

    Args:
      what: the program is, for messages.
      compile_it: compiles it.
      beside: bytes that lie on a device meanwhile and aren't among the program's arguments.
      mesh: of the run.

    Raises:
      DeviceMemoryError: if they haven't.
    """
    remedy = (
        "Take a smaller train.batch_size or a larger optimizer.accumulate, another model.remat, or more devices "
        "(mesh.fsdp and mesh.tensor also split parameters and optimizer)."
    )
    try:
        compiled = compile_it()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The compiler for TPUs looks for room itself.
        raise DeviceMemoryError(
            f"{what} can't be compiled into a device's memory ({brief(error)}). {remedy}"
        ) from error
    if limit(mesh.local_devices):
        check_room(what, {**memory(compiled), "beside them": beside}, mesh, remedy)
    return compiled


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
