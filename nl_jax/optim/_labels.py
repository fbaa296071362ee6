"""Parameter groups by label, for transforms that treat groups differently.

Leaves of other groups become `optax.MaskedNode`, an empty pytree, so every
remaining leaf keeps its path. Trees may hold MaskedNodes already, when such a
transform runs inside `optax.partition` or `optax.masked`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

Tree = Any
Labels = Tree | Callable[[Tree], Tree]


def is_masked(x: Any) -> bool:
  """Whether x stands for a leaf that another transform looks after."""
  return isinstance(x, optax.MaskedNode)


def resolve(labels: Labels, tree: Tree) -> Tree:
  """One label for each leaf of `tree`; `labels` may be a prefix tree.

  Raises:
    ValueError: a label is not a string, or the trees do not fit.
  """
  labels = labels(tree) if callable(labels) else labels
  paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
  flat = []
  # A prefix holds one label for a whole subtree; MaskedNodes pass through.
  jax.tree.map(
    lambda label, sub: flat.extend(
      [label] * len(jax.tree.leaves(sub, is_leaf=is_masked))
    ),
    labels,
    tree,
    is_leaf=is_masked,
  )
  for (path, leaf), label in zip(paths, flat):
    if not is_masked(leaf) and not isinstance(label, str):
      raise ValueError(
        f"labels must be strings, got {label!r} at {jax.tree_util.keystr(path)}"
      )
  return jax.tree.unflatten(treedef, flat)


def select(tree: Tree, labels: Tree, label: str) -> Tree:
  """`tree` with MaskedNode for every leaf whose label is another one."""
  return jax.tree.map(
    lambda x, name: x if not is_masked(x) and name == label else _MASKED,
    tree,
    labels,
    is_leaf=is_masked,
  )


def merge(groups: dict[str, Tree], labels: Tree, default: Tree) -> Tree:
  """Each leaf from the group of its label, or else from `default`."""
  names = list(groups)

  def pick(name, fallback, *choices):
    if is_masked(fallback) or name not in groups:
      return fallback
    return choices[names.index(name)]

  return jax.tree.map(
    pick, labels, default, *groups.values(), is_leaf=is_masked
  )


_MASKED = optax.MaskedNode()
