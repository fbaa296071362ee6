"""Softmax attention: the library's, in float64 our own, on TPUs a kernel."""

from typing import Annotated

import jax
import jax.numpy as jnp

from nl_jax import sharding, types
from nl_jax.fields import OneOf
from nl_jax.kernels import splash_attention

IMPLEMENTATIONS = ("auto", "xla", "pallas_tpu", "pallas_interpret")
Implementation = Annotated[str, OneOf(*IMPLEMENTATIONS)]


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


def _layout() -> sharding.P:
  return sharding.spec("batch", "length", "heads", "head_dim")


def fused(
  q_BxTxHxK: types.Array, k_BxTxGxK: types.Array, implementation: str
) -> bool:
  """Whether `fused_attention` is to run.

  Args:
    q_BxTxHxK, k_BxTxGxK: queries and keys of a whole text.
    implementation: of `IMPLEMENTATIONS`; "auto": where it can.

  Raises:
    ValueError: a kernel was asked for by name and cannot run; why.
  """
  if implementation == "xla":
    return False
  reason = splash_attention.supports(
    q_BxTxHxK,
    k_BxTxGxK,
    spec=_layout(),
    interpret=implementation == "pallas_interpret",
  )
  if reason is not None and implementation != "auto":
    raise ValueError(
      f"model.mixer.implementation={implementation!r}: splash attention "
      f"cannot run here: {reason}; or set it to 'auto'"
    )
  return reason is None


def fused_attention(
  q_BxTxHxK: types.Array,
  k_BxTxGxK: types.Array,
  v_BxTxGxK: types.Array,
  document_BxT: types.Array | None,
  window: int,
  implementation: str,
) -> types.Array:
  """Causal attention of a whole text, by the kernel; one derivative only.

  Args:
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK: queries, keys and values.
    document_BxT: int32, that of each token; None: one a row.
    window: tokens that each token sees, itself included; 0: all.
    implementation: as `fused` allows.

  Returns:
    y_BxTxHxK.
  """
  return splash_attention.splash_attention(
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    document_BxT,
    window=window,
    spec=_layout(),
    interpret=implementation == "pallas_interpret",
  )
