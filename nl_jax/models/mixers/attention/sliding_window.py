"""Sliding-window attention: each token sees itself and W-1 before it.

The cache is a window of W-1 tokens, the newest last; a call lays it just
before its own first real token, attends along the band, and cuts the next
window after its last one. Time grows with T W and the state not at all.
Padding between two real tokens of one document, which no packer makes, counts
as tokens of the window.
"""

import jax
import jax.numpy as jnp

from nl_jax import sharding, types
from nl_jax.models import layers
from nl_jax.models.mixers.attention import softmax


def lay(
  carried: types.Array, new: types.Array, real_BxT: types.Array
) -> tuple[types.Array, types.Array]:
  """The window before the tokens of a call, and the window after it.

  Args:
    carried: [B,W-1,...], the newest last.
    new: [B,T,...].
    real_BxT: bool, no padding.

  Returns:
    [B,W-1+T,...], where token t stands at W-1+t, and the next window.
  """
  begin, end = layers.real_span(real_BxT)
  buffer = layers.lay(carried, new.astype(carried.dtype), begin)
  size = carried.shape[1]
  cut = lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, size)
  return buffer, jax.vmap(cut)(buffer, end)


def attend_own(
  q_BxTxHxK: types.Array,
  k: types.Array,
  v: types.Array,
  query_document_BxT: types.Array,
  document_BxT: types.Array,
  window: int,
  always: tuple[types.Array, types.Array] | None = None,
) -> types.Array:
  """`attend` among the tokens of a call that nothing is before.

  Each shard of a text looks W-1 tokens back, into those before it.

  Args:
    q_BxTxHxK: rotated queries.
    k, v: [B,T,G,K].
    query_document_BxT: int32, the document of each token.
    document_BxT: int32, that of each key; 0 where there is none.
    window: W.
    always: as `attend`.

  Returns:
    y_BxTxHxK.
  """

  def run(k, v, document, q, own, *always):
    return attend(q, k, v, own, document, always or None)

  return sharding.with_reach(
    run, window - 1, [k, v, document_BxT], [q_BxTxHxK, query_document_BxT],
    always or (),
  )  # fmt: skip


def attend(
  q_BxTxHxK: types.Array,
  k: types.Array,
  v: types.Array,
  query_document_BxT: types.Array,
  key_document: types.Array,
  always: tuple[types.Array, types.Array] | None = None,
) -> types.Array:
  """Softmax attention along a band, in blocks of at most W queries.

  Args:
    q_BxTxHxK: rotated queries.
    k, v: [B,W-1+T,G,K]; token t stands at W-1+t.
    query_document_BxT: int32, the document of each token.
    key_document: int32 [B,W-1+T], that of each key; 0 where there is none.
    always: keys and values [1,N,G,K] that every query sees besides.

  Returns:
    y_BxTxHxK.
  """
  batch, tokens = q_BxTxHxK.shape[:2]
  window = k.shape[1] - tokens + 1
  block = min(tokens, window)
  count = -(-tokens // block)
  extra = count * block - tokens
  queries = lambda x: _blocks(_pad(x, extra), block)
  span = block + window - 1

  def keys(x: types.Array) -> types.Array:
    """[B count,span,...]: block i reads what stands at i block and after."""
    x = _pad(x, extra)
    if count == 1:
      return x
    # Here block = W: a span is two blocks, but for the last place.
    x = _pad(x, 1)
    x = x.reshape((batch, count + 1, block) + x.shape[2:])
    x = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)[:, :, :span]
    return x.reshape((batch * count,) + x.shape[2:])

  ahead = jnp.arange(span)[None, None] - jnp.arange(block)[None, :, None]
  mask = (ahead >= 0) & (ahead < window)
  mask &= queries(query_document_BxT)[:, :, None] == keys(key_document)[:, None]
  q, k, v = queries(q_BxTxHxK), keys(k), keys(v)
  if always is not None:
    k, v, mask = before(always, k, v, mask)
  y = softmax.attention(q, k, v, mask[:, None])
  return y.reshape((batch, count * block) + y.shape[2:])[:, :tokens]


def before(
  always: tuple[types.Array, types.Array],
  k: types.Array,
  v: types.Array,
  mask_BxTxS: types.Array,
) -> tuple[types.Array, types.Array, types.Array]:
  """Keys, values and mask with keys laid before them that all queries see.

  Args:
    always: keys and values [1,N,G,K].
    k, v: [B,S,G,K].
    mask_BxTxS: bool, which of these a query sees.
  """
  lay_one = lambda own, x: jnp.concatenate(
    [jnp.broadcast_to(own, (x.shape[0], *own.shape[1:])), x], axis=1
  )
  count = [(0, 0), (0, 0), (always[0].shape[1], 0)]
  mask_BxTxS = jnp.pad(mask_BxTxS, count, constant_values=True)
  return lay_one(always[0], k), lay_one(always[1], v), mask_BxTxS


def _pad(x: types.Array, count: int) -> types.Array:
  """`count` zeros after the tokens."""
  return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2))


def _blocks(x: types.Array, block: int) -> types.Array:
  """[B,count block,...] to [B count,block,...]."""
  return x.reshape((-1, block) + x.shape[2:])
