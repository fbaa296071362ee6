"""Rank-one memory, all tokens of a chunk at once (model.md 2.5).

Exact: with D = W - R, the rows e_t = u_t D_{t-1} that the erase term needs
solve one unit lower triangular system a chunk, and every W_t is then a known
sum of rank-one terms that is applied to reads without being formed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import inverse, segments

_NEVER = -1e30


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision=inverse.PRECISION)


class _Segments(NamedTuple):
  """Which pairs may meet, and what each token's document began with.

  Attributes:
    same: bool [..., C, C], tokens of one document.
    carried: bool [..., C], tokens of the document that the chunk began in.
    first: float [..., C, C], one-hot row: the first token of t's document.
  """

  same: jax.Array
  carried: jax.Array
  first: jax.Array


def _segments(ids: jax.Array, dtype: jnp.dtype) -> _Segments:
  index = segments.running_index(ids, jnp.zeros_like(ids[..., 0]))
  same = index[..., :, None] == index[..., None, :]
  head = jnp.diff(index, axis=-1, prepend=-1) > 0
  first = (same & head[..., None, :]).astype(dtype)
  return _Segments(same, index == 0, first)


def _decay(rows: jax.Array, columns: jax.Array, allowed: jax.Array):
  # Masked inside the exponent: exp of a positive difference above the
  # diagonal overflows, and its gradient would be NaN.
  difference = rows[..., :, None] - columns[..., None, :]
  return jnp.exp(jnp.where(allowed, difference, _NEVER))


class _Gains(NamedTuple):
  """Weights of the base state and of the writes, for W_t or for W_{t-1}.

  Attributes:
    base: [..., C], of D at the start; momentum: [..., C] of S, or None.
    erases, writes: [..., C, C], of the rank-one terms of tokens s <= t.
  """

  base: jax.Array
  momentum: jax.Array | None
  erases: jax.Array
  writes: jax.Array


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
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """The exact chunk form; arguments and results as `api.rank_one`."""
  log_alpha, log_beta, write, erase, mask = gates
  dtype, C, rank = W.dtype, U.shape[-2], U.ndim - 2
  lower = jnp.tril(jnp.ones((C, C), bool)).reshape((1,) * rank + (C, C))
  strict = lower & ~jnp.eye(C, dtype=bool).reshape((1,) * rank + (C, C))
  packed = None
  if segment_ids is not None:
    packed = _segments(segment_ids, dtype)
    lower, strict = lower & packed.same, strict & packed.same

  real = mask.astype(dtype)
  write = jnp.where(mask, write, 0.0)
  erase = None if erase is None else jnp.where(mask, erase, 0.0)
  log_alpha = jnp.where(mask, log_alpha, 0.0)
  decay = jnp.cumsum(log_alpha, axis=-1)
  momentum = momentum_decays = None
  if S is not None:
    log_beta = jnp.where(mask, log_beta, 0.0)
    momentum = jnp.cumsum(log_beta, axis=-1)
    momentum_decays = _decay(momentum, momentum, lower)

  def gains(level: jax.Array, allowed: jax.Array) -> _Gains:
    """For the states whose own log decay since the start is `level`."""
    origin = 0.0
    if packed is not None:
      previous = decay - log_alpha
      origin = jnp.einsum("...ts,...s->...t", packed.first, previous)
    A = _decay(level, decay, allowed)
    erases = None if erase is None else A * erase[..., None, :]
    if S is None:
      return _Gains(
        jnp.exp(level - origin), None, erases, A * write[..., None, :]
      )
    A = A * real[..., None, :]
    b = jnp.einsum("...ts,...s->...t", A, jnp.exp(momentum))
    if packed is not None:
      b = jnp.where(packed.carried, b, 0.0)
    writes = _matmul(A, momentum_decays) * write[..., None, :]
    return _Gains(jnp.exp(level - origin), b, erases, writes)

  D = W if R is None else W - R
  fresh = None
  if packed is not None:
    fresh = start if R is None else start - R

  def deviation(X: jax.Array) -> jax.Array:
    """X D, with the D of each row's own document at its start."""
    if packed is None:
      return _matmul(X, D)
    carried = packed.carried[..., None]
    return jnp.where(carried, _matmul(X, D), _matmul(X, fresh))

  def base(X: jax.Array, gain: _Gains) -> jax.Array:
    rows = gain.base[..., None] * deviation(X)
    if S is not None:
      rows = rows + gain.momentum[..., None] * _matmul(X, S)
    return rows

  after = gains(decay, lower)
  recalled = None
  if erase is not None or read == "before":
    before = gains(decay - log_alpha, strict)
  if erase is not None:
    gram = _matmul(U, jnp.swapaxes(U, -1, -2))
    rows = base(U, before) - _matmul(before.writes * gram, Delta)
    if erase_of == "whole" and R is not None:
      rows = rows + _matmul(U, R)
    system = inverse.unit_lower_inverse(before.erases * gram)
    recalled = _matmul(system, rows)

  reads = None
  if Q is not None and read == "chunk_start":
    reads = jnp.matmul(Q, W if anchor is None else anchor)
    if packed is not None:
      reads = jnp.where(packed.carried[..., None], reads, jnp.matmul(Q, start))
  elif Q is not None:
    gain = after if read == "after" else before
    cross = jnp.matmul(Q, jnp.swapaxes(U, -1, -2))
    reads = base(Q, gain) - jnp.matmul(gain.writes * cross, Delta)
    if erase is not None:
      reads = reads - jnp.matmul(gain.erases * cross, recalled)
    if R is not None:
      reads = reads + jnp.matmul(Q, R)

  terms = after.writes[..., -1, :, None] * Delta
  if erase is not None:
    terms = terms + after.erases[..., -1, :, None] * recalled
  begin = D
  if packed is not None:
    begin = jnp.where(packed.carried[..., -1:, None], D, fresh)
  Ut = jnp.swapaxes(U, -1, -2)
  W_end = after.base[..., -1, None, None] * begin - _matmul(Ut, terms)
  S_end = None
  if S is not None:
    W_end = W_end + after.momentum[..., -1, None, None] * S
    kept = jnp.exp(momentum[..., -1])
    if packed is not None:
      kept = jnp.where(packed.carried[..., -1], kept, 0.0)
    steps = (momentum_decays[..., -1, :] * write)[..., None] * Delta
    S_end = kept[..., None, None] * S - _matmul(Ut, steps)
  W_end = W_end if R is None else W_end + R
  return reads, W_end, S_end
