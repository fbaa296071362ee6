"""Rank-one memory, one token at a time: the definition (model.md 2.3).

For one weight matrix W (a, b), read as `x @ W`, and a token with layer input
u (a,) and error delta (b,) taken at the anchor:

    S <- beta S - write u^T delta                              (momentum)
    W <- alpha W + (1 - alpha) R - erase u^T (u (W or W - R)) + S

Without momentum the last term is `- write u^T delta`. Every memory of the
project is made of this rule; the chunk form (`xla.py`) is tested against it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments


def _columns(gate: jax.Array, scalar: bool) -> jax.Array:
  """A gate of one token, ready to scale an (a, b) matrix."""
  return gate[..., None, None] if scalar else gate


def rank_one(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  gates: tuple,
  W: jax.Array,
  S: jax.Array | None,
  R: jax.Array | None,
  *,
  read: str,
  erase_of: str,
  anchor: jax.Array | None = None,
  start: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  row: jax.Array | None = None,
  window: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  simplex: bool = False,
  lag: jax.Array | None = None,
  orthogonal: tuple[jax.Array, Callable] | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """The token loop; arguments and results as `api.rank_one`.

  Here alone a gate may also have two more axes, [..., C, a, 1] or
  [..., C, 1, b]: one value for each row or column of W ("channel" gates).
  """
  log_alpha, log_beta, write, erase, mask = gates
  token_axis = U.ndim - 2
  anchor = W if anchor is None else anchor
  R = jnp.zeros_like(W) if R is None else R
  begins = jnp.zeros(mask.shape, bool)
  if segment_ids is not None:
    first = segment_ids[..., :1] * 0
    index = segments.running_index(segment_ids, first[..., 0])
    begins = jnp.diff(index, axis=-1, prepend=first) > 0
  weights = None if window is None else window[2]
  xs = (U, Delta, Q, log_alpha, log_beta, write, erase, mask, begins, row)
  made = None
  if lag is not None:  # The first token's.
    made = jnp.zeros((*lag.shape, U.shape[-2], 1, 1), bool)
    made = made.at[..., 0, 0, 0].set(lag)
  xs = (*xs, made, None if orthogonal is None else orthogonal[0], weights)
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, token_axis, 0), xs)
  scalar = log_alpha.ndim == U.ndim - 1

  if window is not None:
    written = [
      jnp.concatenate(parts, axis=-2) for parts in zip(window, (U, Delta))
    ]

  def token(carry, x):
    W, S, anchor = carry
    u, delta, q, log_alpha, log_beta, write, erase, real, begins, row = x[:-3]
    real, begins = real[..., None, None], begins[..., None, None]
    if segment_ids is not None:
      W = jnp.where(begins, start, W)
      anchor = jnp.where(begins, start, anchor)
      S = None if S is None else jnp.where(begins, 0.0, S)
    alpha = _columns(jnp.exp(log_alpha), scalar)
    step = u[..., :, None] * delta[..., None, :]
    if window is not None:
      step = jnp.einsum("...i,...ia,...ib->...ab", x[-1], *written)
    step = -_columns(write, scalar) * step
    S_new = None
    if S is not None:
      S_new = _columns(jnp.exp(log_beta), log_beta.ndim == u.ndim - 1) * S
      step = S_new = S_new + step
    if orthogonal is not None:
      step = _columns(x[-2], True) * orthogonal[1](S_new)
    W_new = alpha * W + (1.0 - alpha) * R + step
    if erase is not None:
      target = W - R if erase_of == "deviation" else W
      recalled = jnp.einsum("...a,...ab->...b", u, target)
      outer = u[..., :, None] * recalled[..., None, :]
      W_new = W_new - _columns(erase, scalar) * outer
    if simplex:
      whole = jax.nn.log_softmax(W_new, axis=-2)
      W_new = whole if lag is None else jnp.where(x[-3], whole, W_new)
    W_new = jnp.where(real, W_new, W)
    S_new = None if S is None else jnp.where(real, S_new, S)
    y = None
    if q is not None:
      seen = {"after": W_new, "before": W, "chunk_start": anchor}[read]
      if row is not None:
        seen = anchor + _columns(row, True) * (seen - anchor)
      if simplex:
        seen = jnp.exp(seen) if lag is None else jax.nn.softmax(seen, axis=-2)
      y = jnp.einsum("...a,...ab->...b", q, seen)
    return (W_new, S_new, anchor), y

  lead = jnp.broadcast_shapes(W.shape[:-2], U.shape[:-2], Delta.shape[:-2])
  shape = (*lead, *W.shape[-2:])
  carry = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), (W, S, anchor))
  (W, S, _), reads = jax.lax.scan(token, carry, xs)
  reads = None if Q is None else jnp.moveaxis(reads, 0, token_axis)
  return reads, W, S
