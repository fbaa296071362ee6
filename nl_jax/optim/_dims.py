"""Which leaves are matrices, and how their axes divide (optimizers.md 1.4)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax._src import base

from nl_jax.kernels.orthogonalize import api, stack
from nl_jax.optim import _dtypes, _labels

Tree = Any
Dims = stack.Dims
Spec = Dims | None
DimsLike = Tree | Callable[[Tree], Tree] | None

# Searched, ignoring case, in '/'-joined paths: leaves for the fallback.
DEFAULT_EXCLUDE = (
  r"embed|norm|conv|router|lm_head|logits",
  r"(^|/)(head|pos_embedding|persistent)(/|$)",
  r"(^|/)(scale|bias|a_log|dt_bias)$",
)
# The first rule that is found in the path and fits the rank; all other axes
# (layer stack, expert, head, level) are batch.
DEFAULT_RULES = ((r"", stack.MATRIX),)
DENSE_GENERAL_RULES = (
  (r"(^|/)(query|key|value)(/kernel)?$", Dims(-3, (-2, -1))),
  (r"(^|/)out(/kernel)?$", Dims((-3, -2), -1)),
  *DEFAULT_RULES,
)


def matrix_dims_from_paths(
  params: Tree,
  *,
  exclude: Sequence[str] = DEFAULT_EXCLUDE,
  rules: Sequence[tuple[str, Spec]] = DEFAULT_RULES,
  min_dim: int = 1,
) -> Tree:
  """Specs of the matrices among the parameters, by path and shape.

  Embeddings, heads, norms, biases, convolutions and whatever has rank < 2 or a
  short side below `min_dim` get None; every other leaf is (-2, -1) with all
  leading axes as batch, so that a scan-stacked kernel stays a stack.

  Args:
    params: parameters, shapes of them, or a tree with `optax.MaskedNode`s.
    exclude: regular expressions; a path in which one is found gets None.
    rules: pairs (regular expression, spec or None), first match wins.
    min_dim: least short side of a matrix.

  Returns:
    Tree like `params` of `MuonDimensionNumbers` or None.
  """

  def one(path, x):
    name = "/".join(_name(key) for key in path)
    found = lambda pattern: re.search(pattern, name, re.IGNORECASE)
    if _labels.is_masked(x) or x.ndim < 2 or any(map(found, exclude)):
      return None
    for pattern, spec in rules:
      if found(pattern) and (spec is None or x.ndim >= _rank(spec)):
        small = spec is None or min(stack.sizes(x.shape, spec)) < min_dim
        return None if small else spec
    return None

  return jax.tree_util.tree_map_with_path(
    one, params, is_leaf=_labels.is_masked
  )


def _name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def _rank(spec: Dims) -> int:
  count = lambda axis: 1 if isinstance(axis, int) else len(axis)
  return count(spec.reduction_axis) + count(spec.output_axis)


def flat(dims: DimsLike, tree: Tree) -> list[Spec]:
  """One spec a leaf of `tree`; None as `dims` is (-2, -1) for rank >= 2.

  An empty leaf is no matrix.
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
  return matrix_dims_from_paths if dims is None else dims


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
) -> base.GradientTransformation:
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

  return base.GradientTransformation(base.init_empty_state, update)


def partition(
  matrices: base.GradientTransformation,
  others: base.GradientTransformation,
  dims: DimsLike,
  require_matrix: bool = False,
) -> base.GradientTransformationExtraArgs:
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
