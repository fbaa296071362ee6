"""The recurrence of Mamba by token: the definition (docs/mathematics.md 6).

h <- exp(dt A) h + (dt u) B^T;   y = h C
"""

import jax
import jax.numpy as jnp


def selective_scan(
  dt: jax.Array,
  u: jax.Array,
  B: jax.Array,
  C: jax.Array,
  A: jax.Array,
  state: jax.Array,
  begins: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The token loop; arguments and results as `api.selective_scan`."""
  if begins is None:
    begins = jnp.zeros(dt.shape[:2], bool)

  def token(h, x):
    dt, u, B, C, begins = x
    h = jnp.where(begins[:, None, None], 0.0, h)
    write = (dt * u)[..., None] * B[:, None]
    h = jnp.exp(dt[..., None] * A[None]) * h + write
    return h, jnp.einsum("bin,bn->bi", h, C)

  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (dt, u, B, C, begins))
  state, y = jax.lax.scan(token, state, xs)
  return jnp.moveaxis(y, 0, 1), state
