"""Rank-one memory by token: the definition (docs/mathematics.md 2.3).

For one weight matrix W (a, b), read as `x @ W`, and a token with layer input
u (a,) and error delta (b,) taken at the anchor:

    S <- beta S - write u^T delta                              (momentum)
    W <- alpha W + (1 - alpha) R - erase u^T (u (W or W - R)) + S

Without momentum the last term is `- write u^T delta`. Every memory of the
project is made of this rule; the chunk form (`xla.py`) is tested against it.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments
from nl_jax.kernels.rank_one.rates import Rates


def _matrix(rate: jax.Array, scalar: bool) -> jax.Array:
  """A rate of one token, ready to scale an (a, b) matrix."""
  return rate[..., None] if scalar else rate


def rank_one(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  rates: Rates,
  W: jax.Array,
  S: jax.Array | None,
  R: jax.Array | None,
  *,
  read: str,
  erase_of: str,
  anchor: jax.Array | None = None,
  start: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  window: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """The token loop; arguments and results as `api.rank_one`.

  Here alone a gate may also have two more axes in place of one, [..., C, a, 1]
  or [..., C, 1, b]: one value for each row or column of W ("channel" gates).
  """
  log_alpha, log_beta, write, erase, mask = rates
  if isinstance(erase, str):
    erase = write if erase == "write" else write * jnp.exp(log_alpha)
  token_axis = U.ndim - 2
  anchor = W if anchor is None else anchor
  R = jnp.zeros_like(W) if R is None else R
  scalar = log_alpha.ndim == U.ndim
  begins = jnp.zeros(mask.shape[:-1], bool)
  if segment_ids is not None:
    first = segment_ids[..., :1] * 0
    index = segments.running_index(segment_ids, first[..., 0])
    begins = jnp.diff(index, axis=-1, prepend=first) > 0
  weights = None if window is None else window[2]
  if window is not None:
    written = [
      jnp.concatenate(parts, axis=-2) for parts in zip(window, (U, Delta))
    ]
  xs = (U, Delta, Q, log_alpha, log_beta, write, erase, mask, begins, weights)
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, token_axis, 0), xs)

  def token(carry, x):
    W, S, anchor = carry
    u, delta, q, log_alpha, log_beta, write, erase, real, begins, weights = x
    real, begins = real[..., None] != 0, begins[..., None, None]
    if segment_ids is not None:
      W = jnp.where(begins, start, W)
      anchor = jnp.where(begins, start, anchor)
      S = None if S is None else jnp.where(begins, 0.0, S)
    alpha = _matrix(jnp.exp(log_alpha), scalar)
    step = u[..., :, None] * delta[..., None, :]
    if window is not None:
      step = jnp.einsum("...i,...ia,...ib->...ab", weights, *written)
    step = -_matrix(write, scalar) * step
    S_new = None
    if S is not None:
      beta = _matrix(jnp.exp(log_beta), log_beta.ndim == u.ndim)
      step = S_new = beta * S + step
    W_new = alpha * W + (1.0 - alpha) * R + step
    if erase is not None:
      target = W - R if erase_of == "deviation" else W
      recalled = jnp.einsum("...a,...ab->...b", u, target)
      outer = u[..., :, None] * recalled[..., None, :]
      W_new = W_new - _matrix(erase, scalar) * outer
    W_new = jnp.where(real, W_new, W)
    S_new = None if S is None else jnp.where(real, S_new, S)
    y = None
    if q is not None:
      seen = {"after": W_new, "before": W, "chunk_start": anchor}[read]
      y = jnp.einsum("...a,...ab->...b", q, seen)
    return (W_new, S_new, anchor), y

  lead = jnp.broadcast_shapes(W.shape[:-2], U.shape[:-2], Delta.shape[:-2])
  shape = (*lead, *W.shape[-2:])
  carry = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), (W, S, anchor))
  (W, S, _), reads = jax.lax.scan(token, carry, xs)
  reads = None if Q is None else jnp.moveaxis(reads, 0, token_axis)
  return reads, W, S
