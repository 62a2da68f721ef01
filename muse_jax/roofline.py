"""How long a compiled program would take on a TPU, estimated from its text and the chip's published rates.

Nothing here was measured on a TPU. Every instruction takes the longer of its FLOPs at the peak rate and
its bytes at the memory's rate; a collective takes its bytes at the rate of those links of the torus that
its group spans, and hides behind what is scheduled between its start and its end. Real programs reach
less than the published rates, so that the estimate is a bound from below.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muse_jax import hlo, traffic


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one chip (cloud.google.com/tpu/docs, the pages of v4, v5e, v5p and v6e).

    Attributes:
      flops: bfloat16, a second.
      memory_bytes: of HBM.
      memory_rate: of HBM, bytes a second.
      link_rate: of all links between chips together, bytes a second in one direction.
      torus: axes of the links' torus.
      largest: chips of the largest slice; a pod of v5p has 8960, but no slice has more than 16x16x24.
    """

    flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float
    torus: int
    largest: int


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 2400e9 / 8, 3, 4096),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 1600e9 / 8, 2, 256),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 4800e9 / 8, 3, 6144),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 3584e9 / 8, 2, 256),
}
# How jax names what it runs on, and the published bfloat16 rate: TPUs as above, NVIDIA's cards without sparsity.
PEAKS: Mapping[str, float] = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float:
    """FLOPs a second that a utilisation is held against: the published rate, or, of a CPU and what isn't in
    `PEAKS`, that of a large product of float32 matrices, timed now."""
    kind = device.device_kind
    known = [name for name in PEAKS if kind == name or kind.startswith(f"{name}-") or kind.startswith(f"{name} ")]
    if known:
        return PEAKS[max(known, key=len)]
    side = 1024
    matrix = jax.device_put(np.full((side, side), 0.5, np.float32), device)
    product = jax.jit(jnp.dot)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - began)
    # All devices of a CPU, real or simulated, share its cores.
    return 2 * side**3 / min(seconds) / (jax.local_device_count() if device.platform == "cpu" else 1)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one run of a program on one chip; see the top of this file.

    Attributes:
      compute, memory, interconnect: each by itself.
      step: of the instructions one after another, collectives hidden where the schedule hides them.
      exposed: the part of it in which the chip waits for others.
    """

    compute: float
    memory: float
    interconnect: float
    step: float
    exposed: float

    @property
    def binds(self) -> str:
        """Which of the three is the longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def estimate(module: hlo.Module, chip: Chip, coordinates: Sequence[Sequence[int]] = ()) -> Times:
    """The times of a module.

    Args:
      coordinates: of each partition's chip on the torus; without them every collective has all links.
    """
    schedule = _Schedule(module, chip, coordinates)
    step, exposed = schedule.run(module.entry)
    interconnect = sum(
        times * schedule.seconds(exchange)
        for _, instruction, times in hlo.walk(module)
        if (exchange := traffic.collective(module, instruction)) is not None
    )
    return Times(
        hlo.flops(module) / chip.flops, traffic.total_bytes(module) / chip.memory_rate, interconnect, step, exposed
    )


class _Schedule:
    """Runs a module's instructions in their order on a clock."""

    def __init__(self, module: hlo.Module, chip: Chip, coordinates: Sequence[Sequence[int]]):
        self.module, self.chip, self.coordinates = module, chip, coordinates
        self._known: dict[str, tuple[float, float]] = {}

    def seconds(self, exchange: traffic.Collective) -> float:
        """Of a collective, on the links of the axes that its group spans."""
        axes = self._axes(exchange.group)
        return exchange.bytes / (self.chip.link_rate * min(axes, self.chip.torus) / self.chip.torus)

    def _axes(self, group: Sequence[int]) -> int:
        if not self.coordinates or not group:
            return self.chip.torus
        places = [self.coordinates[device] for device in group if device < len(self.coordinates)]
        return max(1, sum(len(set(axis)) > 1 for axis in zip(*places, strict=True)))

    def run(self, name: str) -> tuple[float, float]:
        """(seconds, of which waiting for collectives) of a computation."""
        if name not in self._known:
            self._known[name] = self._run(self.module.computations[name])
        return self._known[name]

    def _run(self, computation: hlo.Computation) -> tuple[float, float]:
        clock = exposed = links_free = memory_free = 0.0
        ends: dict[str, tuple[float, bool]] = {}  # of what goes on meanwhile: when, and whether between chips
        for instruction in computation.instructions.values():
            exchange, own = self._exchange(instruction), self._own(computation, instruction)
            phase, channel = traffic.asynchronous(self.module, instruction) or ("", "")
            later = instruction.opcode.endswith("-start") or phase == "start"
            if phase == "done":
                end, _ = ends.pop(channel, (clock, True))
                exposed += max(0.0, end - clock)
                clock = max(clock, end)
            elif exchange is not None:
                links_free = max(clock, links_free) + self.seconds(exchange)
                ends[channel or instruction.name] = links_free, True
                if phase:
                    clock += own
                if not later:  # a fusion may compute while it exchanges
                    exposed += max(0.0, links_free - clock - own)
                    clock = max(clock + own, links_free)
            elif later:
                memory_free = max(clock, memory_free) + own
                ends[instruction.name] = memory_free, False
            elif instruction.opcode.endswith("-done") and instruction.operands:
                end, between_chips = ends.pop(instruction.operands[0], (clock, False))
                exposed += max(0.0, end - clock) if between_chips else 0.0
                clock = max(clock, end)
            elif instruction.opcode in ("while", "conditional", "call"):
                for part, times in hlo.parts(self.module, instruction):
                    inner, waited = self.run(part)
                    clock, exposed = clock + times * inner, exposed + times * waited
            else:
                clock += own
        return clock, exposed

    def _exchange(self, instruction: hlo.Instruction) -> traffic.Collective | None:
        """The collective that an instruction starts, by itself or in a fusion or an asynchronous call."""
        found = traffic.collective(self.module, instruction)
        if found is not None or instruction.opcode not in ("fusion", "async-start"):
            return found
        inside = [
            exchange
            for part, _ in hlo.parts(self.module, instruction)
            for _, i, _ in hlo.walk(self.module, part)
            if (exchange := traffic.collective(self.module, i)) is not None
        ]
        return dataclasses.replace(inside[0], bytes=sum(e.bytes for e in inside)) if inside else None

    def _own(self, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
        if instruction.opcode in ("while", "conditional", "call"):
            return 0.0
        work = hlo.own_flops(computation, instruction)
        work += sum(count * hlo.flops(self.module, part) for part, count in hlo.parts(self.module, instruction))
        moved = traffic.own_bytes(self.module, computation, instruction)
        return max(work / self.chip.flops, moved / self.chip.memory_rate)


def report(times: Times, model_flops: float, chip: Chip, chips: int) -> dict[str, Any]:
    """The section `estimate` of a compilation's report.

    Args:
      model_flops: of a step on all chips.
    """
    return {
        "compute_s": times.compute,
        "memory_s": times.memory,
        "interconnect_s": times.interconnect,
        "exposed_interconnect_s": times.exposed,
        "step_s": times.step,
        "binds": times.binds,
        "utilisation": model_flops / (times.step * chip.flops * chips) if times.step else math.nan,
        "days_1m_steps": times.step * 1e6 / 86400,
    }
