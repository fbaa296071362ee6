"""Trees of matrix specs, and what is done leaf by leaf with them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nl_jax.kernels.orthogonalize import api, stack
from nl_jax.optim import _dtypes, _matrices

Tree = Any
Dims = stack.Dims
Spec = _matrices.Spec
DimsLike = _matrices.DimsLike


def flat(dims: DimsLike, tree: Tree) -> list[Spec]:
  """One spec a leaf of `tree`; None as `dims` is (-2, -1) for rank >= 2.

  An empty leaf is not a matrix.
  """
  leaves = jax.tree.leaves(tree)
  if dims is None:
    return [stack.MATRIX if x.ndim >= 2 and x.size else None for x in leaves]
  return api.flat_dims(dims(tree) if callable(dims) else dims, tree)


def as_tree(dims: DimsLike, tree: Tree) -> Tree:
  """`flat`, in the structure of `tree`."""
  return jax.tree.unflatten(jax.tree.structure(tree), flat(dims, tree))


def from_paths(dims: DimsLike) -> DimsLike:
  """What the aliases mean by `dims`: None selects by path."""
  return _matrices.matrix_dims_from_paths if dims is None else dims


def norm(x: jax.Array, spec: Spec) -> jax.Array:
  """Frobenius norm of each matrix (of the whole leaf for None), kept dims."""
  axes = None
  if spec is not None:
    _, reduction, output = stack.axes(x.shape, spec)
    axes = reduction + output
  return _dtypes.safe_sqrt(
    jnp.sum(_dtypes.abs_square(x), axis=axes, keepdims=True)
  )


def scale_by_shape(
  dims: DimsLike = None, consistent_rms: jax.typing.ArrayLike | None = None
) -> optax.GradientTransformation:
  """Scales matrices of fan-in c and fan-out r; other leaves pass.

  consistent_rms * sqrt(max(c, r)) (arXiv 2502.16982), or sqrt(max(1, r / c))
  for None.
  """

  def one(u, spec):
    if spec is None:
      return u
    c, r = stack.sizes(u.shape, spec)
    if consistent_rms is None:
      return u * max(1.0, r / c) ** 0.5
    return (u * (consistent_rms * max(c, r) ** 0.5)).astype(u.dtype)

  def update(updates, state, params=None):
    del params
    leaves, treedef = jax.tree.flatten(updates)
    scaled = map(one, leaves, flat(dims, updates))
    return jax.tree.unflatten(treedef, list(scaled)), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def partition(
  matrices: optax.GradientTransformation,
  others: optax.GradientTransformation,
  dims: DimsLike,
  require_matrix: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """`matrices` on the leaves with a spec, `others` on the rest."""

  def labels(params):
    leaves, treedef = jax.tree.flatten(params)
    specs = flat(dims, params)
    if require_matrix and leaves and not any(specs):
      raise ValueError(
        "require_matrix=True, but no leaf is a matrix; shapes are "
        f"{[x.shape for x in leaves]}. optax.flatten destroys matrices"
      )
    names = ["other" if s is None else "matrix" for s in specs]
    return jax.tree.unflatten(treedef, names)

  return optax.partition({"matrix": matrices, "other": others}, labels)
