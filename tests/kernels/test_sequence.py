"""Walks whose tokens are split over devices are the walk of one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from nl_jax import sharding
from nl_jax.kernels import walk
from tests.kernels import test_walk as walks
from tests.kernels import walk_bodies as bodies


def alone(*of):
  """The columns' chunk function has no outputs."""
  return bodies.linear(*of)[0], (), None


def widen(slow, xs, heads, count):
  behind = lambda w: jnp.pad(w, [(0, 0), (0, 0), (0, count)])
  xs = xs | {"v": walk.wider(xs["v"], heads, count)}
  return slow | {"w": behind(slow["w"])}, xs


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
    xs = jax.tree.map(lambda x: 0.4 * x, args[2])  # Else the MLP runs off.
    args = (*args[:2], xs, *args[3:])
    alone = walks.both_ways(args, implementation="xla")
    count = sizes.pop("devices", 8)
    mesh = sharding.mesh(**dict(fsdp=1) | sizes, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      split = walks.both_ways(args, implementation="xla", spec=SPEC)
    *outs, sums = split.pop("outs")
    *expected, counted = alone.pop("outs")
    walks.close((outs, split), (expected, alone), 1e-10)
    walks.close(sums, counted, 1e-6)  # Metrics are float32.


@pytest.mark.parametrize("columns", [None, walk.Columns(alone, widen)])
def test_kernels_walk_the_pieces(columns):
  """Interpreted, over rows, tokens and heads at once."""
  args = walks.call("linear", B=4, N=4, H=4)
  how = dict(implementation="pallas_interpret")
  alone = walks.both_ways(args, **how)
  with jax.set_mesh(sharding.mesh(fsdp=2, sequence=2, tensor=2)):
    split = walks.both_ways(args, spec=SPEC, columns=columns, **how)
  walks.close(split, alone, 1e-5)
