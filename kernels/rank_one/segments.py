"""Documents inside a row: which one a token belongs to, where each begins."""

import jax
import jax.numpy as jnp


def running_index(ids: jax.Array, previous: jax.Array) -> jax.Array:
  """How many documents have begun up to and with each token.

  Args:
    ids: int32 [..., T]; 0 is padding, which takes the index before it.
    previous: int32 [...], the id of the last real token before the call; 0
      where there was none: the first document then has index 0 as well.

  Returns:
    int32 [..., T], 0 for tokens of the document that `previous` names.
  """
  positions = jnp.arange(ids.shape[-1], dtype=jnp.int32)
  positions = jnp.broadcast_to(positions, ids.shape)
  real = ids != 0
  last = jax.lax.cummax(jnp.where(real, positions, -1), axis=ids.ndim - 1)
  before = jnp.concatenate(
    [jnp.full_like(last[..., :1], -1), last[..., :-1]], axis=-1
  )
  seen = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=-1)
  seen = jnp.where(before < 0, previous[..., None], seen)
  begins = real & (ids != seen) & (seen != 0)
  return jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
