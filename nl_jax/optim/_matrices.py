"""Which leaves are matrices: by shape, and by the names that codes use.

A matrix is a linear map between two spaces of features: only there does an
orthogonal update mean something. Tables of embeddings, output heads, filters
of convolutions, norms and biases go to another optimizer. `explain_matrices`
says what was chosen, and why.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from nl_jax.kernels.orthogonalize import stack
from nl_jax.optim import _labels

Tree = Any
Dims = stack.Dims
Spec = Dims | None
DimsLike = Tree | Callable[[Tree], Tree] | None

# What may follow the name of a layer in the path of its matrix.
_KERNEL = r"(/(kernel|weight|w|embedding))?$"
# Searched, ignoring case, in '/'-joined paths: leaves for the fallback.
DEFAULT_EXCLUDE = (
  r"embed|norm|conv|router|lm_head|logits",
  r"(^|/)(pos_embedding|persistent)(/|$)",
  r"(^|/)(scale|bias|a_log|dt_bias)$",
  # Tables of tokens and positions, also as tok_emb, emb_in.
  r"(^|/)(wte|wpe|tok|pos|vocab|rel_pos|relpos)(/|$)",
  r"(^|[/_])emb([/_]|$)",
  # Heads, by whatever stands before: mlm_head, value_head. Not multi_head.
  r"(^|/)((?!multi)\w+_)?head(/|$)",
  r"(^|/)(classifier|predictions|readout|score|to_logits)(/|$)",
  # Filters whose layers are named by their place.
  r"(^|/)(stem|patch\w*|downsample|upsample|dwise|depthwise|pointwise)"
  + _KERNEL,
)
# An output that is in no block is a head: that of an attention is none.
_OUTPUT = (
  r"^(?!.*(layer|block|att|mlp|ffn|feed|\d/))(\w+/)*(output|out|fc)" + _KERNEL
)
# The first rule that is found in the path and fits the rank; all other axes
# (layer stack, expert, head, level) are batch.
DEFAULT_RULES = ((r"", stack.MATRIX),)
DENSE_GENERAL_RULES = (
  (r"(^|/)(query|key|value)(/kernel)?$", Dims(-3, (-2, -1))),
  (r"(^|/)out(/kernel)?$", Dims((-3, -2), -1)),
  *DEFAULT_RULES,
)
_WINDOWS = (1, 3, 5, 7, 9, 11)  # Sides of a filter's square window.
_COLOURS = 4  # Of an image: such a filter may have any window.
# Sides of a table: of a vocabulary, and so much longer than wide.
_TABLE = (4096, 30)


def matrix_dims_from_paths(
  params: Tree,
  *,
  exclude: Sequence[str] = DEFAULT_EXCLUDE,
  rules: Sequence[tuple[str, Spec]] = DEFAULT_RULES,
  min_dim: int = 2,
  by_shape: bool = True,
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
    by_shape: leave out, whatever `exclude` says: heads (rank 2, named output,
      out or fc, and in no layer, block, attention or MLP); filters (rank 4 or
      more, a square window with an odd side of at most 11 on the first two or
      the last two axes, or any square before at most 4 colours); tables (4096
      or more rows, 30 times as long as wide).

  Returns:
    Tree like `params` of `MuonDimensionNumbers` or None.
  """
  treedef, rows = _choose(params, exclude, rules, min_dim, by_shape)
  return jax.tree.unflatten(treedef, [spec for _, spec, _ in rows])


def explain_matrices(
  params: Tree,
  *,
  exclude: Sequence[str] = DEFAULT_EXCLUDE,
  rules: Sequence[tuple[str, Spec]] = DEFAULT_RULES,
  min_dim: int = 2,
  by_shape: bool = True,
) -> dict[str, str]:
  """What `matrix_dims_from_paths` makes of each leaf, in words.

  Args:
    params, exclude, rules, min_dim, by_shape: see `matrix_dims_from_paths`.

  Returns:
    By '/'-joined path: "matrix 64 x 128", "12 matrices 64 x 128", or "other: "
    and why. Leaves that another transform looks after are left out.
  """
  _, rows = _choose(params, exclude, rules, min_dim, by_shape)
  return {name: text for name, _, text in rows if text}


def _choose(
  params: Tree,
  exclude: Sequence[str],
  rules: Sequence[tuple[str, Spec]],
  min_dim: int,
  by_shape: bool,
) -> tuple[Any, list[tuple[str, Spec, str]]]:
  """The tree's structure, and (path, spec, explanation) of each leaf."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=_labels.is_masked
  )
  rows = []
  for path, x in leaves:
    name = path_name(path)
    if _labels.is_masked(x):
      rows.append((name, None, ""))
      continue
    why = _no_matrix(name, x.shape, exclude, by_shape)
    spec = None if why else _spec(name, x.shape, rules)
    if spec is not None:
      c, r = stack.sizes(x.shape, spec)
      count = x.size // max(c * r, 1)
      text = (
        f"matrix {c} x {r}" if count == 1 else f"{count} matrices {c} x {r}"
      )
      if min(c, r) < min_dim:
        spec, why = None, f"a side of {min(c, r)} is below {min_dim}"
    elif not why:
      why = "a rule says so"
    rows.append((name, spec, f"other: {why}" if why else text))
  return treedef, rows


def _no_matrix(
  name: str, shape: tuple[int, ...], exclude: Sequence[str], by_shape: bool
) -> str:
  """Why a leaf is not a matrix, or nothing."""
  if len(shape) < 2:
    return f"rank {len(shape)}"
  if 0 in shape:
    return "it is empty"
  for pattern in exclude:
    found = re.search(pattern, name, re.IGNORECASE)
    if found:
      return f"its name has {found[0].strip('/_') or found[0]!r}"
  if not by_shape:
    return ""
  if len(shape) == 2 and re.search(_OUTPUT, name, re.IGNORECASE):
    return "an output that is in no block"
  if len(shape) > 3 and _is_filter(shape):
    return f"a filter by its shape {shape}"
  short, long = sorted(shape[-2:])
  if long >= _TABLE[0] and long >= _TABLE[1] * short:
    return f"a table by its shape {shape}"
  return ""


def _is_filter(shape: tuple[int, ...]) -> bool:
  """Whether it is one of a convolution, (y, x, in, out) or (out, in, y, x)."""
  windows = [a for a, b in (shape[:2], shape[-2:]) if a == b]
  of_image = shape[0] == shape[1] and shape[2] <= _COLOURS
  return of_image or any(a in _WINDOWS for a in windows)


def _spec(
  name: str, shape: tuple[int, ...], rules: Sequence[tuple[str, Spec]]
) -> Spec:
  """The spec of the first rule that fits."""
  for pattern, spec in rules:
    if re.search(pattern, name, re.IGNORECASE):
      if spec is None or len(shape) >= _rank(spec):
        return spec
  return None


def path_name(path: Sequence[Any]) -> str:
  """'/'-joined names of a path."""
  return jax.tree_util.keystr(bare(path), simple=True, separator="/")


def bare(path: Sequence[Any]) -> tuple[Any, ...]:
  """A path without the box around an array.

  flax.nnx hands `Variable`s to `init` and arrays to `update`: both are to have
  one name.
  """
  boxed = path and path[-1] == jax.tree_util.GetAttrKey("value")
  return tuple(path[:-1] if boxed else path)


def _rank(spec: Dims) -> int:
  count = lambda axis: 1 if isinstance(axis, int) else len(axis)
  return count(spec.reduction_axis) + count(spec.output_axis)
