"""Sharded Newton-Schulz on eight CPU devices, read off the HLO."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Dims

from nl_jax.kernels import orthogonalize as ops

_MATRIX = Dims(-2, -1)
_KINDS = ("all-to-all", "all-gather", "all-reduce", "collective-permute")


def _mesh(kind, **axes):
  types = (getattr(AxisType, kind),) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def _collectives(text):
  return {k: len(re.findall(rf" {k}(?:-start)?\(", text)) for k in _KINDS}


def _compile(mesh, tree, specs, sharding):
  """(result, collectives) of one compiled orthogonalisation."""
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
  with jax.set_mesh(mesh):
    tree = jax.tree.map(jax.device_put, tree, shardings)
    call = jax.jit(
      lambda t: ops.orthogonalize_tree(t, _MATRIX, sharding=sharding),
      out_shardings=shardings,
    )
    compiled = call.lower(tree).compile()
    return compiled(tree), _collectives(compiled.as_text())


def _check(tree, got):
  want = ops.orthogonalize_tree(tree, _MATRIX)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want
  )


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("stack", [16, 12])
def test_two_all_to_alls_and_no_all_gather(kind, stack):
  tree, spec = _normal(stack, 16, 24), P(None, "fsdp", None)
  sharding = ops.NSSharding(("fsdp",), spec)
  got, counts = _compile(_mesh(kind, fsdp=8), tree, spec, sharding)
  assert counts["all-to-all"] == 2, counts
  assert sum(counts.values()) == 2, counts
  _check(tree, got)


def test_equal_shapes_move_as_one_stack():
  tree = {k: _normal(4, 16, 16, seed=i) for i, k in enumerate("abcd")}
  specs = dict.fromkeys(tree, P(None, "fsdp", None))
  sharding = ops.NSSharding(("fsdp",), lambda t: specs)
  got, counts = _compile(_mesh("Auto", fsdp=8), tree, specs, sharding)
  assert counts["all-to-all"] == 2 and counts["all-gather"] == 0, counts
  _check(tree, got)


def test_two_axes_move_one_at_a_time():
  tree, spec = _normal(8, 16, 24), P(None, "fsdp", "tensor")
  mesh = _mesh("Auto", fsdp=4, tensor=2)
  sharding = ops.NSSharding(("fsdp", "tensor"), spec)
  got, counts = _compile(mesh, tree, spec, sharding)
  assert counts["all-to-all"] == 4 and counts["all-gather"] == 0, counts
  _check(tree, got)


def test_the_long_side_may_stay_spread():
  tree, spec = _normal(4, 8, 32), P(None, "fsdp", "tensor")
  mesh = _mesh("Auto", fsdp=4, tensor=2)
  sharding = ops.NSSharding(("fsdp",), spec, long_axis="tensor")
  got, counts = _compile(mesh, tree, spec, sharding)
  assert counts["all-to-all"] == 2 and counts["all-gather"] == 0, counts
  assert counts["all-reduce"] == 2, counts  # The norm, and the loop's Gram.
  _check(tree, got)


def test_an_axis_that_only_replicates_computes_twice():
  tree, spec = _normal(4, 16, 24), P(None, "fsdp", None)
  mesh = _mesh("Auto", data=2, fsdp=4)
  got, counts = _compile(mesh, tree, spec, ops.NSSharding(("fsdp",), spec))
  assert counts["all-to-all"] == 2 and counts["all-gather"] == 0, counts
  _check(tree, got)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
  "spec", [P(None, "x", None), P("x", None, None), P(None, None, "x")]
)
def test_without_a_plan_it_is_slow_but_right(kind, spec):
  tree = _normal(8, 16, 8)
  got, _ = _compile(_mesh(kind, x=8), tree, spec, None)
  _check(tree, got)


def test_explicit_leaves_tell_their_own_layout():
  tree, spec = _normal(16, 16, 8), P(None, None, "x")
  mesh = _mesh("Explicit", x=8)
  got, counts = _compile(mesh, tree, spec, ops.NSSharding(("x",)))
  assert counts["all-to-all"] == 2 and counts["all-gather"] == 0, counts
  _check(tree, got)


def test_needs_a_mesh_with_the_axes_named():
  with pytest.raises(ValueError, match="set_mesh"):
    ops.orthogonalize(
      jnp.ones((8, 4, 4)), sharding=ops.NSSharding(("fsdp",), P())
    )
