"""Meshes of devices that need not exist: chips at their places on a torus."""

import dataclasses
import itertools

import numpy as np
import pytest

from muse_jax import specs
from muse_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made by of a TPU."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0

    @property
    def process_index(self) -> int:
        return self.id // 4


def torus(*sides: int, slices: int = 1) -> list[Chip]:
    places = list(itertools.product(*map(range, reversed(sides))))
    flat = [(number, tuple(reversed(place))) for number in range(slices) for place in places]
    return [Chip(i, place, number) for i, (number, place) in enumerate(flat)]


def spread(chips: np.ndarray) -> list[int]:
    """Along how far each side of the torus a group of chips reaches."""
    return [len({chip.coords[side] for chip in chips.flat}) for side in range(3)]


def test_a_side_of_the_torus_may_be_split_over_two_axes():
    """The 3B config's 4x64 on v6e:16x16; each axis' chips lie side by side."""
    mesh = sharding.make_mesh(specs.MeshSpec(4, -1, 1), torus(16, 16, 1))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 64, "tensor": 1}
    assert all(sorted(spread(group)) == [1, 4, 16] for group in mesh.devices[:, :, 0])
    assert len({chip.id for chip in mesh.devices.flat}) == 256


def test_the_short_side_is_for_data():
    """As the 3B config's comments on v4:4x8x8 say."""
    mesh = sharding.make_mesh(specs.MeshSpec(4, -1, 1), torus(4, 8, 8))
    assert all(sorted(spread(group)) == [1, 8, 8] for group in mesh.devices[:, :, 0])


def test_only_data_goes_between_slices():
    mesh = sharding.make_mesh(specs.MeshSpec(2, -1, 4, slices=2), torus(4, 4, 4, slices=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 4}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (specs.MeshSpec(2, -1, 1), "mesh.slices is 1, but the 128 devices of the mesh are of 2"),
        (specs.MeshSpec(4, -1, 1, slices=4), "mesh.slices is 4, but the 128 devices of the mesh are of 2"),
        (specs.MeshSpec(2, 16, 1, slices=2), "mesh.slices is 2, but the 32 devices of the mesh are of 1; .* to -1"),
        (specs.MeshSpec(6, 16, 1, slices=2), "'data': 6.* takes 96 of the devices, which are no block"),
        (specs.MeshSpec(1, 6, 1), "'fsdp': 6.* takes 6 of the devices, which are no block"),
        (specs.MeshSpec(3, 1, 1, slices=2), "mesh.data 3 is not a multiple of mesh.slices 2"),
        (specs.MeshSpec(3, -1, 1), "mesh axes of 3 devices don't divide the 128 present"),
        (specs.MeshSpec(256, 1, 1), "needs 256 devices, but 128 are present"),
        (specs.MeshSpec(-1, -1, 1), "at most one is -1"),
        (specs.MeshSpec(0, 1, 1), "sizes are at least 1"),
    ],
)
def test_meshes_that_cannot_be_say_what_to_change(mesh, said):
    with pytest.raises(specs.SpecError, match=said):
        sharding.make_mesh(mesh, torus(4, 4, 4, slices=2))
