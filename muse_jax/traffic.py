"""What a compiled program moves: bytes to and from a chip's main memory, and between chips."""

import dataclasses
import math
import re

import numpy as np

from muse_jax import hlo

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Moves nothing, or is counted where its parts are.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
_FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "add-dependency"}


def own_bytes(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Bytes that one instruction reads from and writes to the chip's main memory.

    Of an operand that is only sliced, the slice; of one that is updated in place, the update.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _kind(opcode):
        return 0.0
    if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0.0
    if opcode.endswith("-start"):  # copies between memories, of a whole or a slice: what is on the slow side
        sides = instruction.leaves[:2]
        return sum(not leaf.fast for leaf in sides) * min((leaf.bytes for leaf in sides), default=0.0)
    inner = module.computations.get(instruction.called.get("calls", "")) if opcode == "fusion" else None
    if (found := asynchronous(module, instruction)) is not None and found[0] == "done":
        return 0.0  # what arrived was counted as the start's
    total = 0.0
    for index, name in enumerate(instruction.operands):
        made = computation.instructions.get(name)
        if made is not None:
            total += _read(module, made, instruction, index, inner)
    return total + _written(computation, instruction, inner)


def _slow(instruction: hlo.Instruction) -> float:
    return sum(leaf.bytes for leaf in instruction.leaves if not leaf.fast)


def _read(
    module: hlo.Module, made: hlo.Instruction, user: hlo.Instruction, index: int, inner: hlo.Computation | None
) -> float:
    whole = _slow(made)
    if not whole:
        return 0.0
    if inner is None:
        if user.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
            return min(whole, user.bytes)
        return 0.0 if user.opcode == "dynamic-update-slice" and index == 0 else whole
    parameter = next((i for i in inner.instructions.values() if _is_parameter(i, index)), None)
    return whole if parameter is None else min(whole, _used(module, inner, parameter))


def _is_parameter(instruction: hlo.Instruction, index: int) -> bool:
    return instruction.opcode == "parameter" and instruction.attributes == str(index)


def _used(module: hlo.Module, inner: hlo.Computation, value: hlo.Instruction) -> float:
    """Bytes of a fusion's operand that its users inside look at."""
    total = 0.0
    for user in inner.users.get(value.name, []):
        first = user.operands[0] == value.name
        if user.opcode in ("bitcast", "reshape", "copy", "convert") and user.name != inner.root.name:
            total += _used(module, inner, user) * (value.bytes / user.bytes if user.bytes else 1.0)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += user.leaves[0].size * value.bytes / max(value.leaves[0].size, 1)
        elif (user.opcode == "dynamic-update-slice" and first) or _passes_on(inner, user):
            continue
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"]]
            at = user.operands.index(value.name)
            parameter = next(i for i in nested.instructions.values() if _is_parameter(i, at))
            total += _used(module, nested, parameter)
        else:
            return value.bytes
    return total


def _passes_on(inner: hlo.Computation, user: hlo.Instruction) -> bool:
    """A fusion's outputs may be operands that it leaves alone, as the buffers of an exchange that goes on meanwhile."""
    return (user.opcode == "tuple" and user.name == inner.root.name) or _kind(user.opcode) is not None


def _written(computation: hlo.Computation, instruction: hlo.Instruction, inner: hlo.Computation | None) -> float:
    where, root = (computation, instruction) if inner is None else (inner, inner.root)
    while root.opcode == "bitcast" and (made := where.operand(root, 0)) is not None:
        root = made
    outputs = [where.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(outputs) != len(instruction.leaves):
        return _slow(instruction)
    total = 0.0
    for output, leaf in zip(outputs, instruction.leaves, strict=True):
        if inner is not None and root.opcode == "tuple" and (output.opcode == "parameter" or _kind(output.opcode)):
            continue
        update = where.operand(output, 1) if output.opcode == "dynamic-update-slice" else None
        total += 0.0 if leaf.fast else leaf.bytes if update is None else update.bytes
    return total


# ----------------------------------------------------------------------------------- collectives


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: of `COLLECTIVES`.
      bytes: that a chip receives, if the chips of a group pass them around a ring.
      group: devices (numbers of partitions) of the first group.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]


def collective(module: hlo.Module, instruction: hlo.Instruction) -> Collective | None:
    """The exchange that an instruction starts, if it does."""
    kind = _kind(instruction.opcode)
    if kind is None or instruction.opcode.endswith("-done") or instruction.name in module.continued:
        return None
    group = _group(instruction.attributes) or tuple(range(module.partitions))  # "{}": all of them
    sizes = [leaf.bytes for leaf in instruction.leaves]
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute") and len(sizes) > 1:
        given = len(instruction.operands)
        sizes = sizes[given : 2 * given]  # (operands, results, ...)
    if instruction.name in module.scattered:
        kind, sizes = "reduce-scatter", [sum(sizes) / max(len(group), 1)]
    others = (len(group) - 1) / max(len(group), 1)
    factor = {"all-gather": others, "all-reduce": 2 * others, "reduce-scatter": len(group) - 1, "all-to-all": others}
    return Collective(kind, sum(sizes) * factor.get(kind, 1.0), group)


def asynchronous(module: hlo.Module, instruction: hlo.Instruction) -> tuple[str, str] | None:
    """("start" or "done", channel) of a fusion that starts or ends an exchange that goes on during other fusions."""
    inner = module.computations.get(instruction.called.get("calls", "")) if instruction.opcode == "fusion" else None
    if inner is None or (phase := hlo.async_phase(inner)) is None:
        return None
    channels = (hlo.channel(i) for i in inner.instructions.values() if _kind(i.opcode))
    return phase, next(channels, "")


def _kind(opcode: str) -> str | None:
    plain = opcode.removesuffix("-start").removesuffix("-done")
    return plain if plain in COLLECTIVES else None


def _group(attributes: str) -> tuple[int, ...]:
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if found:
        dims = [int(n) for n in found.group(3).split(",")]
        order = np.arange(math.prod(dims)).reshape(dims)
        if found.group(4):
            order = order.transpose([int(n) for n in found.group(4).split(",")])
        return tuple(order.reshape(int(found.group(1)), int(found.group(2)))[0].tolist())
    found = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(([\d,]*)\))?\s*\{(.*?)\}", attributes)
    if found:
        group = _mesh_group(dict(re.findall(r"'([^']+)'=(\d+)", found.group(1))), found.group(3))
        order = [int(n) for n in (found.group(2) or "").split(",") if n]
        return tuple(order[place] for place in group) if order else group
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    return tuple(int(n) for n in found.group(1).split(",")) if found else ()


def _mesh_group(axes: dict[str, str], chosen: str) -> tuple[int, ...]:
    """The group of the first place along the chosen axes of a mesh; "axis:(before)size" is a part of one."""
    places = np.zeros((1,), int)
    sizes = {name: int(size) for name, size in axes.items()}
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        after = [size for other, size in sizes.items() if list(sizes).index(other) > list(sizes).index(name)]
        size = int(part or sizes[name])
        stride = math.prod(after) * (sizes[name] // (int(before or 1) * size))
        places = (places[:, None] + stride * np.arange(size)[None, :]).reshape(-1)
    return tuple(places.tolist())


def collectives(module: hlo.Module) -> dict[str, dict[str, float | int]]:
    """{kind: {"count", "bytes"}} of a run of the program."""
    found: dict[str, dict[str, float | int]] = {}
    for _, instruction, times in hlo.walk(module):
        exchange = collective(module, instruction)
        if exchange is not None:
            entry = found.setdefault(exchange.kind, {"count": 0, "bytes": 0.0})
            entry["count"] += times
            entry["bytes"] += times * exchange.bytes
    return found


def total_bytes(module: hlo.Module, computation: str | None = None) -> float:
    """Bytes read from and written to main memory, loops counted as often as they run."""
    name = module.entry if computation is None else computation
    where = module.computations[name]
    total = 0.0
    for instruction in where.instructions.values():
        total += own_bytes(module, where, instruction)
        if instruction.opcode in ("while", "conditional", "call"):
            total += sum(count * total_bytes(module, part) for part, count in hlo.parts(module, instruction))
    return total
