"""How far a memory has moved, and how it is kept from moving further.

What writes are fast weights: of memories (`w`, and with it what belongs to
them), of recurrent mixers (S, h) and of levels in context (`params`). Windows
of convolutions, caches of attention and counters only follow the text.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax import sharding, types
from nl_jax.models import lm

_PLACE = r"layers/((slow|begin|now|fast)/)?(\w+/)*"
# The weights whose change is measured.
WEIGHTS = re.compile(
  rf"{_PLACE}(w/\w+|S_BxHxKx[KV]|h_BxIxN)|levels/\w+/params/\w+"
)
# All that a write changes; the place in a section of titans_mac is its cache's.
WRITTEN = re.compile(
  rf"(?!layers/segment/phase){_PLACE}((anchor|w|s|carried)/\w+|phase|place|"
  r"S_BxHxKx[KV]|h_BxIxN)|levels/.+"
)


@jax.jit
def distance(state: Any, since: Any) -> types.Array:
  """[B]: norm of the change of all fast weights of each row.

  Args:
    state, since: two states of one model, B rows.
  """

  def square(path: Any, x: jax.Array, y: jax.Array) -> jax.Array | None:
    if not WEIGHTS.fullmatch(sharding.path_name(path)):
      return None
    axis = lm.batch_axis(path)
    others = tuple(i for i in range(x.ndim) if i != axis)
    return jnp.sum(jnp.square(x - y), axis=others)

  squares = jax.tree_util.tree_map_with_path(square, state, since)
  return jnp.sqrt(sum(jax.tree.leaves(squares)))


@jax.jit
def hold(state: Any, kept: Any, rows_B: types.Array) -> Any:
  """A state whose given rows remember what `kept` does, and nothing later.

  Args:
    state: after some tokens.
    kept: before them.
    rows_B: bool, which rows.
  """

  def choose(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    if not WRITTEN.fullmatch(sharding.path_name(path)):
      return new
    shape = [1] * new.ndim
    shape[lm.batch_axis(path)] = -1
    return jnp.where(rows_B.reshape(shape), old, new)

  return jax.tree_util.tree_map_with_path(choose, state, kept)


def has_memory(state: Any) -> bool:
  """Whether there is anything in a state that writes."""
  return any(
    WEIGHTS.fullmatch(sharding.path_name(path))
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  )
