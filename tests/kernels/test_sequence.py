"""Walks whose tokens are split over devices are the walk of one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from nl_jax import sharding
from tests.kernels import test_walk as walks

SPEC = P(("replica", "fsdp"), "sequence", "tensor")


@pytest.mark.parametrize(
  ("kind", "sizes", "B"),
  [
    ("linear", dict(sequence=2, devices=2), 3),
    ("linear", dict(sequence=4, fsdp=2), 4),
    ("mlp", dict(sequence=8), 2),
  ],
)
def test_a_pipeline_is_the_walk_of_one_device(kind, sizes, B):
  """Documents and padding across devices; states, edges and gradients too."""
  with jax.enable_x64(True):
    args = walks.call(kind, B=B, N=8, H=2, K=4, dtype=jnp.float64)
    alone = walks.both_ways(args, implementation="xla")
    count = sizes.pop("devices", 8)
    mesh = sharding.mesh(**dict(fsdp=1) | sizes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      split = walks.both_ways(args, implementation="xla", spec=SPEC)
    *outs, sums = split.pop("outs")
    *expected, counted = alone.pop("outs")
    walks.close((outs, split), (expected, alone), 1e-10)
    walks.close(sums, counted, 1e-6)  # Metrics are float32.
