"""Columns on a simplex, one token at a time: the definition.

For one weight matrix W (a, b) = softmax(A), read as `x @ W`, and a token with
layer input u (a,) and error delta (b,) taken at the anchor:

    A <- log softmax(alpha A - write u^T delta)

Miras, arXiv 2504.13173 (Memora): retention by relative entropy.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments
from nl_jax.kernels.rank_one.rates import Rates


def matrix(rate: jax.Array, tokens: jax.Array) -> jax.Array:
  """A rate of tokens [..., C, d] as [..., C, a, b] broadcasts."""
  return rate if rate.ndim > tokens.ndim else rate[..., None]


def simplex(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  rates: Rates,
  A: jax.Array,
  *,
  lag: jax.Array | None,
  read: str,
  anchor: jax.Array,
  start: jax.Array | None,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array]:
  """The token loop; arguments and results as `api.simplex`."""
  axis = U.ndim - 2
  mask = rates.mask[..., None] != 0
  begins = jnp.zeros((*mask.shape[:-2], 1, 1), bool)
  if segment_ids is not None:
    first = segment_ids[..., :1] * 0
    index = segments.running_index(segment_ids, first[..., 0])
    begins = (jnp.diff(index, axis=-1, prepend=first) > 0)[..., None, None]
  whole = jnp.ones_like(mask)  # Where columns are made to sum to 1.
  if lag is not None:
    t = jax.lax.broadcasted_iota(jnp.int32, mask.shape, axis)
    whole = (t == 0) & lag[..., None]
  alpha, write = jnp.exp(rates.log_alpha), rates.write
  xs = (U, Delta, Q, matrix(alpha, U), matrix(write, U), mask, begins, whole)
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)

  def token(carry, x):
    A, anchor = carry
    u, delta, q, alpha, write, real, begins, whole = x
    if segment_ids is not None:
      A = jnp.where(begins, start, A)
      anchor = jnp.where(begins, start, anchor)
    after = alpha * A - write * u[..., :, None] * delta[..., None, :]
    after = jnp.where(whole, jax.nn.log_softmax(after, axis=-2), after)
    after = jnp.where(real, after, A)
    y = None
    if q is not None:
      seen = {"after": after, "before": A, "chunk_start": anchor}[read]
      y = jnp.einsum("...a,...ab->...b", q, jax.nn.softmax(seen, axis=-2))
    return (after, anchor), y

  lead = jnp.broadcast_shapes(A.shape[:-2], U.shape[:-2], Delta.shape[:-2])
  shape = (*lead, *A.shape[-2:])
  carry = jnp.broadcast_to(A, shape), jnp.broadcast_to(anchor, shape)
  (A, _), reads = jax.lax.scan(token, carry, xs)
  return None if Q is None else jnp.moveaxis(reads, 0, axis), A
