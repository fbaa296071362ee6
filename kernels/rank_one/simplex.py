"""Logarithms of columns that sum to 1, all tokens of a chunk at once.

    A <- alpha A - write u^T delta;   read softmax(A)

`reference.rank_one` with `simplex` and `lag`: A is made to sum to one, log
softmax(A), at the first token of a chunk alone, so that the others are one
associative scan. Every A_t is formed: C a b numbers a head, for a block.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments


def rank_one(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  gates: tuple,
  W: jax.Array,
  *,
  lag: jax.Array,
  read: str,
  anchor: jax.Array,
  start: jax.Array | None,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array, None]:
  """The chunk form; arguments and results as `api.rank_one`."""
  log_alpha, _, write, _, mask = gates
  matrix = lambda x: x if x.ndim > U.ndim else x[..., None, None]
  real = mask[..., None, None]
  alpha = jnp.where(real, jnp.exp(matrix(log_alpha)), 1.0)
  step = -matrix(write) * U[..., :, None] * Delta[..., None, :]
  step = jnp.where(real, step, 0.0)
  shape = jnp.broadcast_shapes(W.shape[:-2] + (1, 1, 1), step.shape)
  alpha, step = jnp.broadcast_to(alpha, shape), jnp.broadcast_to(step, shape)
  index = None
  if segment_ids is not None:
    first = segment_ids[..., 0] * 0
    index = segments.running_index(segment_ids, first)[..., None, None]
    begins = jnp.diff(index, axis=-3, prepend=0) > 0
    step = jnp.where(begins, step + alpha * start[..., None, :, :], step)
    alpha = jnp.where(begins, 0.0, alpha)
  head = alpha[..., 0, :, :] * W + step[..., 0, :, :]
  made = lag[..., None, None] & real[..., 0, :, :]
  head = jnp.where(made, jax.nn.log_softmax(head, axis=-2), head)
  step = jnp.concatenate([head[..., None, :, :], step[..., 1:, :, :]], axis=-3)
  merge = lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1])
  _, A = jax.lax.associative_scan(merge, (alpha, step), axis=step.ndim - 3)
  if Q is None:
    return None, A[..., -1, :, :], None
  begin = jnp.broadcast_to(W, head.shape)[..., None, :, :]
  seen = A
  if read == "before":
    seen = jnp.concatenate([begin, A[..., :-1, :, :]], axis=-3)
    if index is not None:
      seen = jnp.where(begins, start[..., None, :, :], seen)
  elif read == "chunk_start":
    seen = jnp.broadcast_to(anchor, head.shape)[..., None, :, :]
    if index is not None:
      seen = jnp.where(index > 0, start[..., None, :, :], seen)
    seen = jnp.broadcast_to(seen, shape)
  weights = jax.nn.softmax(seen, axis=-2)
  return jnp.einsum("...ca,...cab->...cb", Q, weights), A[..., -1, :, :], None
