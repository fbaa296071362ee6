"""Softmax attention: the library's, in float64 our own, or a kernel's."""

from typing import Annotated

import jax
import jax.numpy as jnp

from nl_jax import sharding, types
from nl_jax.fields import OneOf
from nl_jax.kernels import cudnn_attention, splash_attention

IMPLEMENTATIONS = (
  "auto", "xla", "pallas_tpu", "pallas_interpret", "cudnn",
)  # fmt: skip
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


def kernel(
  q_BxTxHxK: types.Array, k_BxTxGxK: types.Array, implementation: str
) -> str | None:
  """The kernel that `fused_attention` is to run; None: XLA's form instead.

  Args:
    q_BxTxHxK, k_BxTxGxK: queries and keys of a whole text.
    implementation: of `IMPLEMENTATIONS`; "auto": splash attention on a TPU and
      cuDNN's on a GPU, where they take the shapes.

  Raises:
    ValueError: a kernel was asked for by name and cannot run; why.
  """
  if implementation == "xla":
    return None
  asked = ("pallas_tpu", "cudnn") if implementation == "auto" else ()
  for name in asked or (implementation,):
    reason = _why_not(q_BxTxHxK, k_BxTxGxK, name)
    if reason is None:
      return name
  if implementation == "auto":
    return None
  raise ValueError(
    f"model.mixer.implementation={implementation!r} cannot run here: {reason}; "
    "or set it to 'auto'"
  )


def _why_not(
  q_BxTxHxK: types.Array, k_BxTxGxK: types.Array, name: str
) -> str | None:
  """Why a kernel does not take the arrays, or None where it does."""
  arrays = q_BxTxHxK, k_BxTxGxK
  if name == "cudnn":
    return cudnn_attention.supports(*arrays, spec=_layout())
  return splash_attention.supports(
    *arrays, spec=_layout(), interpret=name == "pallas_interpret"
  )


def fused_attention(
  q_BxTxHxK: types.Array,
  k_BxTxGxK: types.Array,
  v_BxTxGxK: types.Array,
  document_BxT: types.Array | None,
  window: int,
  name: str,
) -> types.Array:
  """Causal attention of a whole text by a kernel; one derivative only.

  Args:
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK: queries, keys and values.
    document_BxT: int32, that of each token; None: one a row.
    window: tokens that each token sees, itself included; 0: all.
    name: of `kernel`.

  Returns:
    y_BxTxHxK.
  """
  arrays = q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, document_BxT
  if name == "cudnn":
    return cudnn_attention.cudnn_attention(
      *arrays, window=window, spec=_layout()
    )
  return splash_attention.splash_attention(
    *arrays, window=window, spec=_layout(), interpret=name == "pallas_interpret"
  )
