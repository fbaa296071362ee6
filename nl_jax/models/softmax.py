"""Softmax attention over given keys: the library's, and in float64 our own."""

import jax
import jax.numpy as jnp

from nl_jax import types


def attention(
  q_BxTxHxK: types.Array,
  k: types.Array,
  v: types.Array,
  mask: types.Array | None,
) -> types.Array:
  """softmax(q kᵀ K^-1/2) v.

  Query head h attends to head h // (H/G) of k and v. Where no key is allowed
  the result has no meaning.

  Args:
    q_BxTxHxK: queries.
    k, v: [B,S,G,K].
    mask: bool [B,1,T,S] (or 1 row), what may be seen; None: causal, S = T.

  Returns:
    y_BxTxHxK in the dtype of q.
  """
  if q_BxTxHxK.dtype != jnp.float64:
    return jax.nn.dot_product_attention(
      q_BxTxHxK, k, v, mask=mask, is_causal=mask is None
    )
  # The library's softmax is float32 whatever its inputs are.
  k, v = (jnp.repeat(x, q_BxTxHxK.shape[2] // x.shape[2], 2) for x in (k, v))
  if mask is None:
    tokens = q_BxTxHxK.shape[1]
    mask = jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))
  scale = q_BxTxHxK.shape[-1] ** -0.5
  logits = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k) * scale
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
  return jnp.einsum("bhts,bshk->bthk", weights, v)
