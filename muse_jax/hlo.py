"""Reads compiled programs, as XLA's text: their instructions, loops and FLOPs.

XLA's own cost analysis counts the body of a loop once, which for scanned layers is most of the program.
Here a loop's body counts as many times as `known_trip_count` says, or its condition's constant. What is
read is the optimized module of one device (`compiled.as_text()`), so that everything is what one chip does.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_LEAF = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a shape; `fast` if it lies in one of a TPU's on-chip memories."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype)
        if bits is None:
            digits = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(digits.group(1)) if digits else 0
        return self.size * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    called: dict[str, str]
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(leaf.bytes for leaf in self.leaves)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that makes an operand."""
        if index >= len(instruction.operands):
            return None
        return self.instructions.get(instruction.operands[index])

    @functools.cached_property
    def root(self) -> Instruction:
        found = [i for i in self.instructions.values() if i.root]
        return found[-1] if found else list(self.instructions.values())[-1]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A program, of one of so many partitions."""

    computations: dict[str, Computation]
    entry: str
    partitions: int = 1

    @functools.cached_property
    def scattered(self) -> frozenset[str]:
        """Names of the all-reduces that are a part of a reduce-scatter."""
        return frozenset(
            i.name
            for computation in self.computations.values()
            if _scatters(computation)
            for i in computation.instructions.values()
            if i.opcode == "all-reduce"
        )

    @functools.cached_property
    def continued(self) -> frozenset[str]:
        """Names of the exchanges that another instruction of the same channel started.

        libtpu spreads an exchange over several fusions: one that starts it, some that compute meanwhile, one
        that waits for its end. Each holds an instruction that looks like the exchange itself.
        """
        started = {
            channel(i)
            for computation in self.computations.values()
            if async_phase(computation) == "start"
            for i in computation.instructions.values()
        } - {""}
        return frozenset(
            i.name
            for name in self._fused - self._scattering
            if async_phase(self.computations[name]) != "start"
            for i in self.computations[name].instructions.values()
            if channel(i) in started
        )

    @functools.cached_property
    def _fused(self) -> frozenset[str]:
        """Names of the computations that are the inside of a fusion."""
        return _insides(self.computations.values())

    @functools.cached_property
    def _scattering(self) -> frozenset[str]:
        """Of these the reduce-scatters that are an exchange by themselves, though they may share another's channel."""
        outside = (c for name, c in self.computations.items() if name not in self._fused)
        return frozenset(name for name in _insides(outside) if _scatters(self.computations[name]))


def _insides(computations: Iterable[Computation]) -> frozenset[str]:
    """Names of what the fusions of some computations call."""
    return frozenset(i.called["calls"] for c in computations for i in c.instructions.values() if i.opcode == "fusion")


def _scatters(computation: Computation) -> bool:
    """Whether this is libtpu's way to write a reduce-scatter: a fusion, so named, of an all-reduce and a slice."""
    return computation.name.startswith("all-reduce-scatter")


def channel(instruction: Instruction) -> str:
    """The number that the parts of an exchange share; "" without one."""
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found.group(1) if found else ""


def async_phase(computation: Computation) -> str | None:
    """Whether a fusion's inside is the "start" or the "done" of an exchange that goes on in between."""
    for instruction in computation.instructions.values():
        found = re.search(r'custom_call_target="AsyncCollective(Start|Done)"', instruction.attributes)
        if found:
            return found.group(1).lower()
    return None


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
      ValueError: if there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, current, lines = "", "", {}
    for line in text.splitlines():
        if not current:
            found = _COMPUTATION.match(line)
            if found:
                current, lines = found.group(2), {}
                entry = current if found.group(1) else entry
        elif line.startswith("}"):
            computations[current], current = Computation(current, lines), ""
        elif (instruction := _instruction(line)) is not None:
            lines[instruction.name] = instruction
    if entry not in computations:
        raise ValueError("this is no HLO text: it has no ENTRY computation.")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if not found:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end])) or _bare_names(rest[:end])
    attributes = rest[end + 1 :]
    if opcode == "constant" or opcode == "parameter":
        operands, attributes = (), rest[:end]
    called = dict(_CALLED.findall(attributes))
    for names in _BRANCHES.findall(attributes):
        called |= {f"branch{i}": name.strip().lstrip("%") for i, name in enumerate(names.split(","))}
    return Instruction(
        found.group(2), opcode.strip(), leaves(shape), operands, called, attributes, bool(found.group(1))
    )


def _split_shape(text: str) -> tuple[str, str]:
    if text.startswith("("):
        end = _closing(text[1:]) + 2
        return text[:end], text[end:].strip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closing(text: str) -> int:
    """Where the bracket that was open before `text` closes."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(text)


def _bare_names(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.split(", ") if (word := part.split(" ")[-1]) and re.fullmatch(r"[\w.\-]+", word))


def leaves(shape: str) -> tuple[Leaf, ...]:
    """The arrays of a shape.

    >>> [leaf.dims for leaf in leaves("(f32[2,3]{1,0}, bf16[]{:T(8)S(1)})")]
    [(2, 3), ()]
    """
    found = _LEAF.findall(shape)
    return tuple(Leaf(d, tuple(int(n) for n in dims.split(",") if n), _fast(layout)) for d, dims, layout in found)


def _fast(layout: str) -> bool:
    """Memory space 0 is the chip's main memory and 5 the host's; all others are on the chip."""
    space = re.search(r"S\((\d)\)", layout)
    return space is not None and space.group(1) not in "05"


# ----------------------------------------------------------------------------------------- loops


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs; None if the text doesn't say."""
    found = re.search(r'"?known_trip_count"?\s*[:=]\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if found:
        return int(found.group(1))
    condition = module.computations.get(loop.called.get("condition", ""))
    if condition is None or "direction=LT" not in condition.root.attributes + _inner_attributes(module, condition.root):
        return None
    constants = [i for i in condition.instructions.values() if i.opcode == "constant" and i.leaves[0].dims == ()]
    whole = [int(i.attributes) for i in constants if re.fullmatch(r"\d+", i.attributes)]
    return whole[0] if len(whole) == 1 else None


def _inner_attributes(module: Module, instruction: Instruction) -> str:
    inner = module.computations.get(instruction.called.get("calls", ""))
    return inner.root.attributes if inner else ""


def parts(module: Module, instruction: Instruction) -> list[tuple[str, int]]:
    """The computations that an instruction runs, each with how often; of branches the dearest."""
    called = instruction.called
    if instruction.opcode == "while":
        return [(called["body"], trip_count(module, instruction) or 1)]
    if instruction.opcode == "conditional":
        branches = [name for key, name in called.items() if "branch" in key or "computation" in key]
        return [(max(branches, key=lambda name: flops(module, name)), 1)] if branches else []
    if instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
        return [(name, 1) for key, name in called.items() if key in ("calls", "to_apply") or key.startswith("branch")]
    return []


def unknown_loops(module: Module) -> list[str]:
    """Loops of which the text doesn't say how often they run; they are counted once."""
    every = (i for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while")
    return [i.name for i in every if trip_count(module, i) is None]


def walk(module: Module, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, how often) of everything that runs, fusions' insides included."""
    name = module.entry if computation is None else computation
    for instruction in module.computations[name].instructions.values():
        yield name, instruction, times
        for part, count in parts(module, instruction):
            yield from walk(module, part, times * count)


# ----------------------------------------------------------------------------------------- FLOPs


def flops(module: Module, computation: str | None = None) -> float:
    """FLOPs of the products and convolutions that a computation (the entry) runs."""
    return _flops(module, module.entry if computation is None else computation, {})


def _flops(module: Module, name: str, known: dict[str, float]) -> float:
    if name not in known:
        computation = module.computations[name]
        every = computation.instructions.values()
        known[name] = sum(own_flops(computation, i) for i in every) + sum(
            count * _flops(module, part, known) for i in every for part, count in parts(module, i)
        )
    return known[name]


def own_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a dot or convolution itself; 0 for everything else."""
    if instruction.opcode == "dot":
        left = computation.operand(instruction, 0)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(a) for a in contracted.group(1).split(",") if a] if contracted else []
        return 2.0 * instruction.leaves[0].size * math.prod(left.leaves[0].dims[a] for a in axes)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0.0


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """2 for each pair of an output and a kernel element that meet inside the picture.

    On TPU products are convolutions too, with windows whose padding and dilation leave single places.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left, kernel = (computation.operand(instruction, i).leaves[0] for i in (0, 1))
    lhs, rhs, out = labels.groups()
    dims = instruction.leaves[0].dims
    total = 2.0 * dims[out.index("b")] * dims[out.index("f")] * kernel.dims[rhs.index("i")]
    window = _window(instruction.attributes)
    for axis in sorted(set(out) - {"b", "f"}):
        side = int(axis)
        settings = {key: values[side] for key, values in window.items() if side < len(values)}
        total *= _meetings(left.dims[lhs.index(axis)], kernel.dims[rhs.index(axis)], dims[out.index(axis)], settings)
    return total


def _window(attributes: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    window: dict[str, list] = {}
    for item in found.group(1).split() if found else []:
        key, _, value = item.partition("=")
        window[key] = [
            tuple(int(p) for p in part.split("_")) if key == "pad" else int(part) for part in value.split("x")
        ]
    return window


def _pair(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split("_"))


def _meetings(size: int, kernel: int, out: int, window: dict) -> int:
    """Pairs (output place, kernel place) that fall on an element of the input, along one axis."""
    stride, spread, hole = window.get("stride", 1), window.get("rhs_dilate", 1), window.get("lhs_dilate", 1)
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * spread - window.get("pad", (0, 0))[0]
    return int(np.sum((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0)))
