"""The open micro-chunk of `incontext`: tokens that were read, not learned from.

It is kept until the token after it arrives, which closes it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import types
from nl_jax.models.incontext import contract


class Buffer(NamedTuple):
  """The open micro-chunk; zeros after its tokens.

  Attributes:
    x_BxCxD: what its tokens were before the first fast level.
    tokens_BxC: int32 ids.
    ids_BxC: int32, their documents; 0: padding, or none yet.
    learn_BxC: weights of their losses in the inner loss.
    phase_B: int32, tokens in it.
  """

  x_BxCxD: types.Array
  tokens_BxC: types.Array
  ids_BxC: types.Array
  learn_BxC: types.Array
  phase_B: types.Array


def of_call(
  model: contract.Learner,
  x_BxTxD: types.Array,
  tokens: types.Array,
  ids: types.Array,
  learn: types.Array,
  closed_B: types.Array,
  end_B: types.Array,
) -> Buffer:
  """The micro-chunk that stays open in each row."""
  C = model.options.chunks[0]
  phase_B = end_B - closed_B * C
  there = jnp.arange(C)[None] < phase_B[:, None]

  def cut(x: types.Array) -> types.Array:
    x = jnp.pad(x, [(0, 0), (0, C)] + [(0, 0)] * (x.ndim - 2))
    take = lambda row, i: jax.lax.dynamic_slice_in_dim(row, i * C, C)
    return jax.vmap(take)(x, closed_B)

  ids = jnp.where(there, cut(ids), 0)
  real = lambda x: where_rows(ids > 0, cut(x), 0)
  return Buffer(real(x_BxTxD), real(tokens), ids, real(learn), phase_B)


def segment(buffer: Buffer) -> types.Array:
  """int32 [B], the document of the last token; 0 before the first."""
  last = jnp.maximum(buffer.phase_B - 1, 0)[:, None]
  return jnp.take_along_axis(buffer.ids_BxC, last, axis=1)[:, 0]


def append(
  buffer: Buffer, new: tuple[types.Array, ...], size_B: types.Array
) -> Buffer:
  """The first `size_B` of the new tokens after those of the buffer.

  Args:
    buffer: with room for them.
    new: x [B,W,D], tokens, ids and learn [B,W]; ids 0 at padding.
    size_B: padding inside included.
  """
  real = new[2] > 0
  rows = jnp.arange(real.shape[0])[:, None]
  place = buffer.phase_B[:, None] + jnp.arange(real.shape[1])[None]
  place = jnp.where(real, place, buffer.ids_BxC.shape[1])
  put = lambda old, x: old.at[rows, place].set(x, mode="drop")
  parts = [put(old, x) for old, x in zip(buffer[:4], new)]
  return Buffer._make([*parts, buffer.phase_B + size_B])


def where_rows(keep: types.Array, x: types.Array, other: int) -> types.Array:
  """x where `keep` [B] or [B,C] is true, over its trailing axes."""
  shape = keep.shape + (1,) * (x.ndim - keep.ndim)
  return jnp.where(keep.reshape(shape), x, jnp.asarray(other, x.dtype))
