"""The general delta rule by token: the definition (docs/mathematics.md 6).

    S <- diag(exp w) S - b^T (a S) + k^T v;   y = q S

The erase acts on the state as it is before it decays.
"""

import jax
import jax.numpy as jnp


def general_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  erase: tuple[jax.Array, jax.Array],
  state: jax.Array,
  begins: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The token loop; arguments and results as `api.general_delta_rule`."""
  if begins is None:
    begins = jnp.zeros(q.shape[:2], bool)

  def token(S, x):
    q, k, v, w, a, b, begins = x
    S = jnp.where(begins[:, None, None, None], 0.0, S)
    erased = b[..., None] * jnp.einsum("bhk,bhkv->bhv", a, S)[:, :, None]
    S = jnp.exp(w)[..., None] * S - erased + k[..., None] * v[:, :, None]
    return S, jnp.einsum("bhk,bhkv->bhv", q, S)

  xs = (q, k, v, log_decay, *erase, begins)
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs)
  state, y = jax.lax.scan(token, state, xs)
  return jnp.moveaxis(y, 0, 1), state
