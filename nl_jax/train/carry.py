"""Memories that are carried from row to row in training.

The rows of a batch are streams (`data.streams`): what a model remembers after a
row is where the next row of the same stream begins. The outer gradient is cut
there, or after several rows (truncated backpropagation through time). What is
carried is part of the training state, so of every checkpoint:

    {"memory": state of the model, B streams; "document_B": int32, the number
    of the document that each stream is in}

A checkpoint holds no array of size 0: in a memory None stands for one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax import sharding
from nl_jax.models import lm

Carried = dict[str, Any]
Batch = dict[str, jax.Array]
# (params, batch of a row of each stream, memory) -> (sum of losses, what
# is added up, the memory after the row).
Row = Callable[[Any, Batch, Any], tuple[jax.Array, Any, Any]]

# Numbers of documents restart there: neighbours differ nevertheless.
_DOCUMENTS = 2**30


def begin(model: Any, params: Any, streams: int) -> Carried:
  """What streams that have read nothing carry.

  Args:
    model: `init_state(params, batch_size)` (nl_jax.models.lm).
    params: of `model.init`.
    streams: B.
  """
  return {
    "memory": kept(model.init_state(params, streams)),
    "document_B": jnp.ones((streams,), jnp.int32),
  }


def kept(memory: Any) -> Any:
  """A state of a model as it is carried, without arrays of size 0."""
  return jax.tree.map(lambda x: x if x.size else None, memory)


def full(model: Any, params: Any, memory: Any) -> Any:
  """The inverse of `kept`."""
  streams = memory.position_B.shape[0]
  like = jax.eval_shape(lambda p: model.init_state(p, streams), params)
  fill = lambda x, held: jnp.zeros(x.shape, x.dtype) if held is None else held
  return jax.tree.map(fill, like, memory)


def shardings(like: Carried, mesh: jax.sharding.Mesh) -> Carried:
  """Shardings of what is carried: streams as the rows of a batch."""
  return {
    "memory": sharding.sequence_shardings(like["memory"], mesh),
    "document_B": sharding.rows_sharding(mesh),
  }


def read_on(
  row: Row, params: Any, batch: Batch, carried: Carried, rows: int
) -> tuple[jax.Array, tuple[Any, Carried]]:
  """Reads the next rows of each stream, one after the other.

  Gradients reach from a row into those before it in this call, and no further.

  Args:
    row: reads one row of each stream.
    params: of the model.
    batch: arrays [B * rows, T], the rows of a stream side by side; the numbers
      in `segment_ids` are those of `data.streams`.
    carried: of the call before.
    rows: of each stream.

  Returns:
    The sum of losses, and (what else is added up, what is carried on).
  """

  def one(carried: Carried, part: Batch) -> tuple[Carried, Any]:
    ids, document_B = part["segment_ids"], carried["document_B"]
    number = lambda ids, of: (ids + of - 2) % _DOCUMENTS + 1
    numbers = jnp.where(ids > 0, number(ids, document_B[:, None]), 0)
    part = part | {"segment_ids": numbers}
    loss, more, memory = row(params, part, carried["memory"])
    last_B = jnp.max(ids, axis=1)
    document_B = jnp.where(last_B > 0, number(last_B, document_B), document_B)
    return {"memory": memory, "document_B": document_B}, (loss, more)

  if rows == 1:
    carried, (loss, more) = one(carried, batch)
    return loss, (more, carried)
  by_row = {k: _by_row(x, rows) for k, x in batch.items()}
  # Between rows only the memory is kept for the backward pass.
  carried, parts = jax.lax.scan(jax.checkpoint(one), carried, by_row)
  loss, more = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
  return loss, (more, carried)


def _by_row(x: jax.Array, rows: int) -> jax.Array:
  """[B * rows, T] to [rows, B, T]."""
  x = x.reshape(-1, rows, x.shape[1]).swapaxes(0, 1)
  return sharding.constrain(x, None, "batch", "length")


def micro(carried: Carried, parts: int) -> Carried:
  """[..., B, ...] to [parts, ..., B / parts, ...], as `step.gradient` cuts."""

  def cut(path: Any, x: jax.Array) -> jax.Array:
    axis = _axis(path)
    shape = (*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

  return jax.tree_util.tree_map_with_path(cut, carried)


def whole(carried: Carried) -> Carried:
  """The inverse of `micro`."""

  def join(path: Any, x: jax.Array) -> jax.Array:
    axis = _axis(path)
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  return jax.tree_util.tree_map_with_path(join, carried)


def _axis(path: Any) -> int:
  """Of the streams."""
  return lm.batch_axis(path[1:]) if len(path) > 1 else 0
