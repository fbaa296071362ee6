"""Orthogonalisation of one tensor, or of all matrices of a tree at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nl_jax.kernels.orthogonalize import (
  coefficients,
  newton_schulz,
  sharded,
  stack,
)

Tree = Any


def orthogonalize(
  x: jax.Array,
  *,
  coeffs: str | coefficients.Table = "jordan",
  ns_steps: coefficients.Steps = 5,
  eps: jax.typing.ArrayLike = 1e-12,
  zeta: jax.typing.ArrayLike = 0.25,
  ns_dtype: jax.typing.DTypeLike | None = None,
  dims: stack.Dims = stack.MATRIX,
  sharding: sharded.NSSharding | None = None,
) -> jax.Array:
  """Approximates U V^H of x = U S V^H by Newton-Schulz (paper eq. 42-44).

  x <- x / (kappa |x|_F + eps), then `ns_steps` times
  x <- a x + (b A + c A A) x with A = x x^H. A zero matrix stays zero, with a
  finite derivative.

  Args:
    x: float or complex tensor of rank >= 2.
    coeffs: a name of `NS_COEFFS`, a table (k, 3) (more steps repeat its last
      row), or "eq44", the gradient step of eq. 44.
    ns_steps: iterations; 0 returns x itself, not normalised. A traced count
      (`optax.inject_hyperparams`) has no derivative backwards.
    eps: added to the norm.
    zeta: step size of "eq44"; stable below 0.4.
    ns_dtype: of the iteration; None is at least float32. The norm always is.
    dims: the matrix axes; all other axes are batch.
    sharding: where a sharded stack is computed.

  Returns:
    Array of the shape and dtype of x.

  Raises:
    ValueError, TypeError: meaningless coefficients, steps or axes.
  """
  return orthogonalize_tree(
    x, dims, coeffs=coeffs, ns_steps=ns_steps, eps=eps, zeta=zeta,
    ns_dtype=ns_dtype, sharding=sharding,
  )  # fmt: skip


def orthogonalize_tree(
  tree: Tree,
  dims: Tree,
  *,
  coeffs: str | coefficients.Table = "jordan",
  ns_steps: coefficients.Steps = 5,
  eps: jax.typing.ArrayLike = 1e-12,
  zeta: jax.typing.ArrayLike = 0.25,
  ns_dtype: jax.typing.DTypeLike | None = None,
  sharding: sharded.NSSharding | None = None,
) -> Tree:
  """`orthogonalize` for every leaf with a spec, equal shapes as one stack.

  Args:
    tree: tensors.
    dims: prefix tree of `MuonDimensionNumbers`; leaves under None pass through.
    coeffs, ns_steps, eps, zeta, ns_dtype, sharding: see `orthogonalize`.

  Returns:
    A tree like `tree`.
  """
  coefficients.check(coeffs, ns_steps)
  leaves, treedef = jax.tree.flatten(tree)
  specs = flat_dims(dims, tree)
  static = coefficients.is_static(ns_steps)
  if static and not ns_steps:
    return tree
  layouts = _leaf_specs(tree, leaves, sharding)

  def loop(x, axis_name=None):
    return newton_schulz.orthogonalize_stack(
      x, coeffs=coeffs, ns_steps=ns_steps, eps=eps, zeta=zeta,
      axis_name=axis_name,
    )  # fmt: skip

  parts = {
    i: _part(x, spec, layout, ns_dtype, sharding)
    for i, (x, spec, layout) in enumerate(zip(leaves, specs, layouts))
    if spec is not None
  }
  for members in _groups(parts).values():
    stacks = [parts[i][0] for i in members]
    x = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
    layout = parts[members[0]][1]
    y = loop(x) if sharding is None else sharded.run(loop, x, layout, sharding)
    start = 0
    for i in members:
      size = parts[i][0].shape[0]
      piece = y if len(stacks) == 1 else y[start : start + size]
      start += size
      made = _unpart(piece, leaves[i], specs[i])
      if not static:
        made = jnp.where(ns_steps > 0, made, leaves[i])
      leaves[i] = made
  return jax.tree.unflatten(treedef, leaves)


def flat_dims(dims: Tree, tree: Tree) -> list[stack.Dims | None]:
  """One spec a leaf of `tree`, from a prefix tree of specs.

  Raises:
    ValueError: `dims` is not a prefix of `tree`, or does not fit a leaf.
  """
  is_spec = lambda x: x is None or isinstance(x, stack.Dims)
  flat: list[stack.Dims | None] = []
  if not jax.tree.leaves(tree):  # Nothing, or optax's placeholder.
    return flat
  try:
    jax.tree.map(
      lambda spec, sub: flat.extend([spec] * len(jax.tree.leaves(sub))),
      dims, tree, is_leaf=lambda x: is_spec(x) or x == (),
    )  # fmt: skip
  except ValueError as error:
    raise ValueError(
      "dims must be a prefix tree of the parameters with MuonDimensionNumbers "
      f"or None as leaves, got {dims}: {error}"
    ) from error
  for spec, (path, x) in zip(flat, jax.tree_util.tree_leaves_with_path(tree)):
    if not is_spec(spec):
      raise ValueError(
        "dims must hold MuonDimensionNumbers or None, got "
        f"{spec!r} at {jax.tree_util.keystr(path)}"
      )
    if spec is not None:
      stack.axes(x.shape, spec, jax.tree_util.keystr(path) or "the root")
  return flat


def _leaf_specs(tree, leaves, sharding):
  """PartitionSpecs of the leaves, None where nothing is known."""
  given = None if sharding is None else sharding.leaf_specs
  if given is None:
    found = [stack.explicit_sharding(x) for x in leaves]
    return [None if s is None else s.spec for s in found]
  flat = []
  jax.tree.map(
    lambda spec, sub: flat.extend([spec] * len(jax.tree.leaves(sub))),
    given(tree) if callable(given) else given,
    tree,
    is_leaf=lambda x: isinstance(x, P) or x == (),
  )
  return flat


def _part(x, dims, spec, ns_dtype, sharding):
  """(stack [S, m, n], layout) of one leaf, cast before it moves."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if ns_dtype is not None:
    complex_x = jnp.issubdtype(x.dtype, jnp.complexfloating)
    dtype = (
      jnp.promote_types(ns_dtype, jnp.complex64) if complex_x else (ns_dtype)
    )
  x = x.astype(dtype)
  if sharding is None:
    x, layout = stack.pack(stack.replicated(x), dims), ((), (), ())
  else:
    x, layout = _pack_sharded(x, dims, spec)
  if x.shape[1] > x.shape[2]:
    x, layout = x.mT, (layout[0], layout[2], layout[1])
  return x, layout


def _pack_sharded(x, dims, spec):
  """`stack.pack` that keeps the mesh axes where a reshape can keep them."""
  axes = stack.axes(x.shape, dims)
  by_axis = sharded.entries(P() if spec is None else spec, x.ndim)
  # A reshape can merge axes only if at most the leading one is sharded.
  layout = tuple(by_axis[group[0]] if group else () for group in axes)
  keep = {group[0] for group in axes if group}
  if any(by_axis[a] for a in range(x.ndim) if a not in keep):
    kept = (by_axis[a] if a in keep else () for a in range(x.ndim))
    x = sharded.move(x, P(*(e or None for e in kept)))
  return stack.pack(x, dims), layout


def _unpart(y, x, dims):
  c, r = stack.sizes(x.shape, dims)
  y = y.mT if c > r else y
  return stack.like(stack.unpack(y, x.shape, dims), x).astype(x.dtype)


def _groups(parts):
  """Leaves whose stacks can be one stack, by shape, dtype and layout."""
  groups = {}
  for i, (x, layout) in parts.items():
    # Stacks that are already spread do not concatenate without traffic.
    alone = i if layout[0] else None
    key = (x.shape[1:], x.dtype, layout, alone)
    groups.setdefault(key, []).append(i)
  return groups
