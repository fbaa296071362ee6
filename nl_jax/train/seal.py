"""Seals of a checkpoint: what is read is what was saved, to the last bit.

What reads arrays and JSON back finds that a file was cut, but not that a bit of
it was turned. So `meta` holds the sum of the bits of each leaf, which is the
same on every mesh, and a hash of itself (`files.sealed`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax import files, sharding

SUMS = "sums"  # The key in `meta`.
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit
def _sums(tree: Any) -> Any:
  """Sums modulo 2**32 of the leaves' bits, read as whole numbers."""

  def one(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    return jnp.sum(bits, dtype=jnp.uint32)

  return jax.tree.map(one, tree)


def sums(tree: Any) -> dict[str, int]:
  """{path: sum of the bits} of a tree of arrays; all processes call it."""
  return {
    sharding.path_name(path): int(x)
    for path, x in jax.tree_util.tree_leaves_with_path(_sums(tree))
  }


def check_sums(tree: Any, meta: Mapping[str, Any]) -> None:
  """Raises `files.BrokenSealError` unless the leaves are what was saved.

  Args:
    tree: what was read.
    meta: with sums of these leaves and maybe others; that of a checkpoint of
      before there were sums has none.
  """
  if SUMS not in meta:
    return
  for name, value in sums(tree).items():
    if meta[SUMS].get(name) != value:
      raise files.BrokenSealError(f"{name} is not what was saved")
