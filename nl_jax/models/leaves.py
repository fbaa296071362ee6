"""The table of a model's parameters: all that follows from one of them.

A table is {path: Leaf}, and a `Leaf` says a parameter's shape, what its axes
are, how it begins, and what an optimizer may do with it. Initial parameters,
their count, their places on a mesh, weight decay and the choice of matrices are
read from the table and stand nowhere else.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import types
from nl_jax.models import layers

Init = Callable[[types.Array, tuple[int, ...]], types.Array]

IN = ("embed", "heads")  # Axes of kernels from the model width to heads,
OUT = ("heads", "embed")  # and back.


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter, of one layer where it stands in a layer.

  Attributes:
    shape: of the parameter.
    axes: their logical names, see `nl_jax.sharding.LOGICAL`.
    init: (key, shape) -> the start.
    decay: whether weight decay acts on it.
    matrix: whether it is a linear map, or a stack of them, between its last
      two axes, which a rule for matrices learns.
    key: path of its key from that of the table, an integer a fold; as the
      places in which `jax.random.split` gives keys.
    by_layer: `init` takes the number of the layer, float32, in place of a key.
    skip: the first layers, which do not have it.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: Init
  decay: bool = False
  matrix: bool = False
  key: tuple[int, ...] = ()
  by_layer: bool = False
  skip: int = 0

  @property
  def size(self) -> int:
    """Numbers in it."""
    return math.prod(self.shape)


Leaves = Mapping[str, Leaf]


def kernel(
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  key: int,
  std: float = layers.INIT_STD,
) -> Leaf:
  """A matrix that begins normal, of the given standard deviation."""
  init = lambda key, shape: layers.normal(key, shape, std)
  return Leaf(shape, axes, init, decay=True, matrix=True, key=(key,))


def constant(
  shape: tuple[int, ...], axes: tuple[str, ...], value: float = 0.0
) -> Leaf:
  """Numbers that begin as `value`: biases and scales, no matrix."""
  return Leaf(shape, axes, lambda _, shape: jnp.full(shape, float(value)))


def scale(size: int, axis: str = "head_dim") -> Leaf:
  """The scale of a norm over `size` numbers."""
  return constant((size,), (axis,), 1.0)


def conv(channels: int, key: int, axis: str = "heads") -> Leaf:
  """Taps of a short convolution of `channels`, see `layers.conv_init`."""
  shape = (layers.CONV_WIDTH, channels)
  first = "act_embed" if axis == "heads" else "chunk"
  init = lambda key, shape: layers.conv_init(key, shape[1])
  return Leaf(shape, (first, axis), init, key=(key,))


def memory(
  init: Callable[[types.Array], Mapping[str, Any]], key: tuple[int, ...]
) -> dict[str, Leaf]:
  """The learned starts and gates that a memory makes itself.

  Args:
    init: key -> its parameters, nested: weights w* (H,a,b), heads of gates
      gate/w_* (H,K) and their biases gate/b_* (H,) or (H,K).
    key: of it.
  """
  made = {}
  shapes = jax.eval_shape(init, jax.random.key(0))
  for path, x in jax.tree_util.tree_leaves_with_path(shapes):
    names = [entry.key for entry in path]
    weights = "gate" not in names
    axes = (
      ("heads", "start_in", "mem_out") if weights else ("heads", "head_dim")
    )
    bias = names[-1].startswith("b_")
    made["/".join(names)] = Leaf(
      x.shape, axes[: x.ndim], _picked(init, names),
      decay=not bias, matrix=not bias, key=key,
    )  # fmt: skip
  return made


def _picked(init: Callable[..., Any], names: list[str]) -> Init:
  """One of the parameters that `init` makes."""

  def one(key: types.Array, shape: tuple[int, ...]) -> types.Array:
    del shape
    tree = init(key)
    for name in names:
      tree = tree[name]
    return tree

  return one


def linen(*path: str | int) -> int:
  """The fold that Linen makes for a parameter of a module.

  Args:
    path: names of the modules below the first, then the number of the
      parameter among those that the module has declared, from 1.
  """
  digest = hashlib.sha1()
  for x in path:
    digest.update(x.encode() if isinstance(x, str) else bytes([x]))
  return int.from_bytes(digest.digest()[:4], "big")


def under(name: str, table: Leaves, *key: int) -> dict[str, Leaf]:
  """A table below `name`, whose keys continue from `key`."""
  return {
    f"{name}/{path}": dataclasses.replace(leaf, key=(*key, *leaf.key))
    for path, leaf in table.items()
  }


def stacked(table: Leaves, count: int, *key: int) -> dict[str, Leaf]:
  """The table of `count` layers, each with a key of its own below `key`."""

  def one(leaf: Leaf) -> Leaf:
    def init(key: types.Array, shape: tuple[int, ...]) -> types.Array:
      del shape
      numbers = jnp.arange(leaf.skip, count)
      if leaf.by_layer:
        layer = lambda i: leaf.init(i.astype(jnp.float32), leaf.shape)
      else:
        layer = lambda i: leaf.init(at(key, (i, *leaf.key)), leaf.shape)
      return jax.vmap(layer)(numbers)

    return Leaf(
      (count - leaf.skip, *leaf.shape), ("layer", *leaf.axes), init,
      leaf.decay, leaf.matrix, key,
    )  # fmt: skip

  return {path: one(leaf) for path, leaf in table.items()}


def at(key: types.Array, path: tuple[Any, ...]) -> types.Array:
  """The key at the end of a path of folds."""
  for place in path:
    fold = np.uint32(place) if isinstance(place, int) else place
    key = jax.random.fold_in(key, fold)
  return key


def drawn(table: Leaves, key: types.Array) -> dict[str, Any]:
  """The initial parameters, a nested dict."""
  return tree(
    {
      path: leaf.init(at(key, leaf.key), leaf.shape)
      for path, leaf in table.items()
    }
  )


def tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict from values by '/'-joined path."""
  made: dict[str, Any] = {}
  for path, value in flat.items():
    *folders, name = path.split("/")
    place = made
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = value
  return made


def shapes(table: Leaves) -> dict[str, Any]:
  """The parameters as `jax.ShapeDtypeStruct`, float32."""
  struct = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
  return tree({path: struct(leaf) for path, leaf in table.items()})


def count(table: Leaves, *below: str) -> int:
  """Parameters of a table, or of those of its folders."""
  return sum(
    leaf.size
    for path, leaf in table.items()
    if not below or path.startswith(tuple(f"{name}/" for name in below))
  )


def axes(table: Leaves) -> dict[str, tuple[str, ...]]:
  """The logical axes of the parameters by path."""
  return {path: leaf.axes for path, leaf in table.items()}
