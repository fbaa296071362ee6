"""States of a model by row, and the named points that a stream keeps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import sharding
from nl_jax.models import lm


class Point(NamedTuple):
  """What a stream remembered when it was marked.

  Attributes:
    state: of the model.
    logits: [B,Vocab] after its last token, or None.
    seen: tokens read.
    about: JSON values.
  """

  state: lm.LMState
  logits: jax.Array | None
  seen: int
  about: dict[str, Any]


def reset(
  model: lm.LanguageModel, params: Any, state: lm.LMState, rows_B: np.ndarray
) -> lm.LMState:
  """Some rows at the start of a sequence; the others bit for bit as they were.

  Args:
    model, params: that the state belongs to.
    state: B rows.
    rows_B: bool, which rows.
  """
  batch = state.position_B.shape[0]
  fresh = model.init_state(params, batch, slots(model, state))
  chosen_B = jnp.asarray(rows_B, bool)
  if chosen_B.shape != (batch,):
    raise ValueError(f"rows_B must be bool [{batch}], got {chosen_B.shape}")

  def choose(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    axis = lm.batch_axis(path)
    shape = [1] * old.ndim
    shape[axis] = batch
    return jnp.where(chosen_B.reshape(shape), new, old)

  return jax.tree_util.tree_map_with_path(choose, fresh, state)


def take(state: lm.LMState, rows: np.ndarray) -> lm.LMState:
  """Rows of a state, in the order given; a row may be taken several times."""
  index = jnp.asarray(rows, jnp.int32)
  pick = lambda path, x: jnp.take(x, index, axis=lm.batch_axis(path))
  return jax.tree_util.tree_map_with_path(pick, state)


def clone(state: lm.LMState) -> lm.LMState:
  """A copy with buffers of its own: a stream gives its state's away."""
  return jax.tree.map(jnp.copy, state)


def detach(state: lm.LMState) -> lm.LMState:
  """The same state, through which no gradient flows."""
  return jax.lax.stop_gradient(state)


def slots(model: lm.LanguageModel, state: lm.LMState) -> int | None:
  """Tokens that an unbounded attention cache has room for."""
  if not model.grows:
    return None
  return max(x.shape[2] for x in jax.tree.leaves(state.layers) if x.ndim > 2)


def named(tree: Any) -> list[tuple[str, Any]]:
  """Leaves by the names of their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(sharding.path_name(path), x) for path, x in leaves]
