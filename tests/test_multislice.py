"""Meshes over slices: replicas cross the network, sides of a torus split."""

import dataclasses
import types

import numpy as np
import pytest

from nl_jax import sharding


def devices(slices, of_a_slice):
  """Neither of them in the order of the slices."""
  return [
    types.SimpleNamespace(
      slice_index=i % slices, id=i, platform="cpu", device_kind="cpu"
    )
    for i in range(slices * of_a_slice)
  ]


@pytest.mark.parametrize("replica", [2, 4])
def test_only_replica_crosses_slices(replica):
  sizes = dict(replica=replica, fsdp=8 // replica, sequence=1, tensor=2)
  found = sharding._over_slices(sizes, 2, devices(2, 8))
  assert found.shape == tuple(sizes.values())
  where = np.vectorize(lambda d: d.slice_index)(found)
  assert {*where.flat} == {0, 1}
  assert len({d.id for d in found.flat}) == 16
  # One slice a replica, and the first half of the replicas are of the first.
  expected = np.repeat([0, 1], replica // 2)
  for index in np.ndindex(found.shape[1:]):
    np.testing.assert_array_equal(where[(slice(None), *index)], expected)


def test_replica_must_cover_the_slices():
  with pytest.raises(ValueError, match="multiple of the 2 slices, got 1"):
    sharding._over_slices(
      dict(replica=1, fsdp=8, sequence=1, tensor=2), 2, devices(2, 8)
    )


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh reads of a device."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str
  platform: str = "tpu"
  core_on_chip: int = 0
  process_index: int = 0


@pytest.mark.parametrize(
  ("kind", "sides", "sizes"),
  [
    ("TPU v6 lite", (16, 16, 1), dict(fsdp=128, tensor=2)),
    ("TPU v5 lite", (16, 16, 1), dict(fsdp=128, tensor=2)),
    ("TPU v5", (4, 4, 4), dict(fsdp=32, tensor=2)),
    ("TPU v4", (4, 4, 4), dict(replica=2, fsdp=4, tensor=8)),
  ],
)
def test_axes_of_a_mesh_may_split_a_side_of_the_torus(kind, sides, sizes):
  chips = [Chip(i, at, kind) for i, at in enumerate(np.ndindex(sides))]
  made = sharding.mesh(**sizes, devices=chips)
  assert {made.shape[axis] == size for axis, size in sizes.items()} == {True}
  assert {chip.id for chip in made.devices.flat} == {*range(len(chips))}
  # Those of `tensor`, which wait for each other most, are near: their chips
  # span no more of the torus than there are of them.
  for group in made.devices.reshape(-1, sizes["tensor"]):
    at = np.array([chip.coords for chip in group])
    spans = at.max(axis=0) - at.min(axis=0) + 1
    assert np.prod(spans) <= sizes["tensor"]
