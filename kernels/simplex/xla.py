"""Columns on a simplex, all tokens of a chunk at once: the form with lags.

    A <- alpha A - write u^T delta;   read softmax(A)

Columns are made to sum to one at the first token of a chunk alone, so that the
others are one associative scan. Every A_t is formed: C a b numbers a head, for
a chunk.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments
from nl_jax.kernels.rank_one.rates import Rates
from nl_jax.kernels.simplex.reference import matrix


def simplex(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  rates: Rates,
  A: jax.Array,
  *,
  lag: jax.Array,
  read: str,
  anchor: jax.Array,
  start: jax.Array | None,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array]:
  """The chunk form; arguments and results as `api.simplex`."""
  real = rates.mask[..., None] != 0
  alpha = jnp.where(real, jnp.exp(matrix(rates.log_alpha, U)), 1.0)
  step = -matrix(rates.write, U) * U[..., :, None] * Delta[..., None, :]
  step = jnp.where(real, step, 0.0)
  shape = jnp.broadcast_shapes(A.shape[:-2] + (1, 1, 1), step.shape)
  alpha, step = jnp.broadcast_to(alpha, shape), jnp.broadcast_to(step, shape)
  index = None
  if segment_ids is not None and start is not None:
    first = segment_ids[..., 0] * 0
    index = segments.running_index(segment_ids, first)[..., None, None]
    begins = jnp.diff(index, axis=-3, prepend=0) > 0
    step = jnp.where(begins, step + alpha * start[..., None, :, :], step)
    alpha = jnp.where(begins, 0.0, alpha)
  head = alpha[..., 0, :, :] * A + step[..., 0, :, :]
  whole = lag & real[..., 0, :, :]
  head = jnp.where(whole, jax.nn.log_softmax(head, axis=-2), head)
  step = jnp.concatenate([head[..., None, :, :], step[..., 1:, :, :]], axis=-3)
  merge = lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1])
  _, after = jax.lax.associative_scan(merge, (alpha, step), axis=step.ndim - 3)
  end = after[..., -1, :, :]
  if Q is None:
    return None, end
  if read == "after":
    seen = after
  elif read == "before":
    begin = jnp.broadcast_to(A, head.shape)[..., None, :, :]
    seen = jnp.concatenate([begin, after[..., :-1, :, :]], axis=-3)
    if index is not None and start is not None:
      seen = jnp.where(begins, start[..., None, :, :], seen)
  else:
    seen = jnp.broadcast_to(anchor, head.shape)[..., None, :, :]
    if index is not None and start is not None:
      seen = jnp.where(index > 0, start[..., None, :, :], seen)
    seen = jnp.broadcast_to(seen, shape)
  weights = jax.nn.softmax(seen, axis=-2)
  return jnp.einsum("...ca,...cab->...cb", Q, weights), end
