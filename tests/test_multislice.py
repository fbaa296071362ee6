"""A mesh over several slices: only the replicas cross the network."""

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
