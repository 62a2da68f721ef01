"""TPU slices as GKE knows them: which topologies exist, and how many hosts and chips per host they have."""

import dataclasses
import math


class SettingsError(ValueError):
    """A setting that cannot work. Says what was given, what was expected, and the mend."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPUs.

    Attributes:
      label: value of the node label cloud.google.com/gke-tpu-accelerator.
      machine: machine type of a node with four chips; that of one chip ends with 1t.
      dimensions: of its interconnect, which is the number of factors of a topology.
      largest: chips of the largest slice; a pod of v5p has 8960, but no slice has more than 16x16x24.
      cores_in_name: TensorCores a chip, as accelerator types such as v4-512 count them.
      xpk: the prefix of its name for xpk and gcloud.
    """

    label: str
    machine: str
    dimensions: int
    largest: int
    cores_in_name: int
    xpk: str


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "ct4p-hightpu-4t", 3, 4096, 2, "v4"),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu-4t", 3, 6144, 2, "v5p"),
    "v5e": Generation("tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 2, 256, 1, "v5litepod"),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard-4t", 2, 256, 1, "v6e"),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # all topologies of v5e and v6e
BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # larger ones of v4 and v5p are made of 4x4x4 cubes


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice.

    Attributes:
      generation: its TPUs.
      topology: chips along each dimension, as GKE writes them.
      chips: of the slice.
      chips_per_host: of one host, which is one node and one pod.
      hosts: of the slice.
    """

    generation: Generation
    topology: str
    chips: int
    chips_per_host: int
    hosts: int

    @property
    def accelerator_type(self) -> str:
        """The name without the topology, v4-512: the core or chip count that gcloud and xpk use."""
        return f"{self.generation.xpk}-{self.chips * self.generation.cores_in_name}"

    @property
    def machine(self) -> str:
        """The GKE machine type of its nodes."""
        return f"{self.generation.machine.removesuffix('4t')}{self.chips_per_host}t"


def make_slice(accelerator: str, topology: str) -> Slice:
    """The slice of an accelerator and a topology.

    Args:
      accelerator: v4, v5e, v5p or v6e.
      topology: chips along each dimension: "4x8x8" for v4 and v5p, "8x16" for v5e and v6e.

    Raises:
      SettingsError: if there is no such accelerator, or it has no such topology.

    >>> make_slice("v4", "4x8x8").hosts
    64
    """
    if accelerator not in GENERATIONS:
        raise SettingsError(
            f"accelerator = {accelerator!r} is unknown; it must be one of {', '.join(GENERATIONS)}. The size of the "
            'slice belongs into topology, as in accelerator = "v4", topology = "4x8x8".'
        )
    generation = GENERATIONS[accelerator]
    factors = topology.split("x")
    if len(factors) != generation.dimensions or not all(factor.isdecimal() and int(factor) for factor in factors):
        example = {3: "4x8x8", 2: "8x16"}[generation.dimensions]
        raise SettingsError(
            f"topology = {topology!r} does not fit {accelerator}, which needs {generation.dimensions} numbers with x "
            f'between them, as in topology = "{example}".'
        )
    sizes = [int(factor) for factor in factors]
    if generation.dimensions == 2:
        _check_flat(accelerator, topology)
    else:
        _check_cubes(accelerator, topology, sizes, generation.largest)
    chips = math.prod(sizes)
    chips_per_host = 1 if chips == 1 else 4
    return Slice(generation, topology, chips, chips_per_host, chips // chips_per_host)


def _check_flat(accelerator: str, topology: str) -> None:
    if topology not in FLAT:
        swapped = "x".join(reversed(topology.split("x")))
        hint = f'; write topology = "{swapped}"' if swapped in FLAT else f"; it must be one of {', '.join(FLAT)}"
        raise SettingsError(f"topology = {topology!r} does not exist on {accelerator}{hint}.")


def _check_cubes(accelerator: str, topology: str, sizes: list[int], largest: int) -> None:
    if math.prod(sizes) > largest:
        raise SettingsError(
            f"topology = {topology!r} has {math.prod(sizes)} chips, but the largest {accelerator} slice has "
            f"{largest}; take a smaller topology, and more slices if you need the chips."
        )
    if topology in BELOW_A_CUBE:
        return
    ordered = "x".join(str(size) for size in sorted(sizes))
    if any(size % 4 for size in sizes):
        raise SettingsError(
            f"topology = {topology!r} does not exist on {accelerator}: it must be one of {', '.join(BELOW_A_CUBE)}, or "
            "have multiples of 4 in all three places, as in 4x4x8."
        )
    if topology != ordered:
        raise SettingsError(
            f"topology = {topology!r} is the same slice as {ordered}, and node pools are labelled with rising sizes; "
            f'write topology = "{ordered}".'
        )
