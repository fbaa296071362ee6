"""Rank-one memory, all tokens of a chunk at once (model.md 2.5).

Exact: with D = W - R, the rows e_t = u_t D_{t-1} that the erase term needs
solve one unit lower triangular system a chunk, and every W_t is then a known
sum of rank-one terms that is applied to reads without being formed.
"""

import functools
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


class _Chunk:
  """One chunk: its decays, and what is known of every W_t without forming it.

  D = W - R throughout. Methods return rows [..., C, b].
  """

  def __init__(
    self,
    U: jax.Array,
    Delta: jax.Array,
    gates: tuple,
    W: jax.Array,
    S: jax.Array | None,
    R: jax.Array | None,
    start: jax.Array | None,
    segment_ids: jax.Array | None,
    window: tuple[jax.Array, jax.Array, jax.Array] | None,
  ):
    log_alpha, log_beta, write, erase, mask = gates
    self.U, self.S, self.R = U, S, R
    # What is written: of the chunk's tokens, or also of some before it.
    self.written, self.Delta, self.weights = U, Delta, None
    if window is not None:
      self.written = jnp.concatenate([window[0], U], axis=-2)
      self.Delta = jnp.concatenate([window[1], Delta], axis=-2)
      self.weights = window[2]
    self.D, self.start = (W if R is None else W - R), start
    self.packed = None
    if segment_ids is not None:
      self.packed = _segments(segment_ids, W.dtype)
      self.fresh = start if R is None else start - R
    self.real = mask.astype(W.dtype)
    self.write = jnp.where(mask, write, 0.0)
    self.erase = None if erase is None else jnp.where(mask, erase, 0.0)
    self.log_alpha = jnp.where(mask, log_alpha, 0.0)
    self.decay = jnp.cumsum(self.log_alpha, axis=-1)
    lower = self._lower(0)
    if S is not None:
      self.momentum = jnp.cumsum(jnp.where(mask, log_beta, 0.0), axis=-1)
      self.momentum_decays = _decay(self.momentum, self.momentum, lower)
    self.after = self._gains(self.decay, lower)

  @functools.cached_property
  def before(self) -> _Gains:
    """The gains of W_{t-1}."""
    return self._gains(self.decay - self.log_alpha, self._lower(-1))

  def _spread(self, rows: jax.Array) -> jax.Array:
    """Weights [..., C] of tokens' writes, as weights of what they write."""
    return rows if self.weights is None else _matmul(rows, self.weights)

  def _lower(self, diagonal: int) -> jax.Array:
    """Pairs (t, s) of one document, s <= t + diagonal."""
    C = self.U.shape[-2]
    lower = jnp.tril(jnp.ones((C, C), bool), diagonal)
    lower = lower.reshape((1,) * (self.U.ndim - 2) + (C, C))
    return lower if self.packed is None else lower & self.packed.same

  def _gains(self, level: jax.Array, allowed: jax.Array) -> _Gains:
    """Of the states whose own log decay since the chunk's start is `level`."""
    origin = 0.0
    if self.packed is not None:
      previous = self.decay - self.log_alpha
      origin = jnp.einsum("...ts,...s->...t", self.packed.first, previous)
    base = jnp.exp(level - origin)
    A = _decay(level, self.decay, allowed)
    erases = None if self.erase is None else A * self.erase[..., None, :]
    if self.S is None:
      writes = self._spread(A * self.write[..., None, :])
      return _Gains(base, None, erases, writes)
    A = A * self.real[..., None, :]
    b = jnp.einsum("...ts,...s->...t", A, jnp.exp(self.momentum))
    if self.packed is not None:
      b = jnp.where(self.packed.carried, b, 0.0)
    writes = _matmul(A, self.momentum_decays) * self.write[..., None, :]
    return _Gains(base, b, erases, self._spread(writes))

  def _base(self, X: jax.Array, gain: _Gains) -> jax.Array:
    """What X reads of the start: of each row's own document."""
    rows = _matmul(X, self.D)
    if self.packed is not None:
      carried = self.packed.carried[..., None]
      rows = jnp.where(carried, rows, _matmul(X, self.fresh))
    rows = gain.base[..., None] * rows
    if self.S is not None:
      rows = rows + gain.momentum[..., None] * _matmul(X, self.S)
    return rows

  def recall(self, erase_of: str) -> jax.Array:
    """Rows u_t D_{t-1} (or u_t W_{t-1}), which the erase term writes back."""
    gram = _matmul(self.U, jnp.swapaxes(self.U, -1, -2))
    rows = self._base(self.U, self.before)
    cross = gram
    if self.weights is not None:
      cross = _matmul(self.U, jnp.swapaxes(self.written, -1, -2))
    rows = rows - _matmul(self.before.writes * cross, self.Delta)
    if erase_of == "whole" and self.R is not None:
      rows = rows + _matmul(self.U, self.R)
    return _matmul(inverse.unit_lower_inverse(self.before.erases * gram), rows)

  def read(
    self, Q: jax.Array, gain: _Gains, recalled: jax.Array | None
  ) -> jax.Array:
    """Rows q_t W_t, or q_t W_{t-1} with the gains before."""
    cross = jnp.matmul(Q, jnp.swapaxes(self.written, -1, -2))
    reads = self._base(Q, gain) - jnp.matmul(gain.writes * cross, self.Delta)
    if recalled is not None:
      cross = cross[..., -self.U.shape[-2] :]
      reads = reads - jnp.matmul(gain.erases * cross, recalled)
    return reads if self.R is None else reads + jnp.matmul(Q, self.R)

  def read_anchor(self, Q: jax.Array, anchor: jax.Array) -> jax.Array:
    """Rows q_t W_anchor, of each row's own document."""
    reads = jnp.matmul(Q, anchor)
    if self.packed is None:
      return reads
    carried = self.packed.carried[..., None]
    return jnp.where(carried, reads, jnp.matmul(Q, self.start))

  def end(
    self, recalled: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """W and S after the last token."""
    terms = self.after.writes[..., -1, :, None] * self.Delta
    wrote = self.written
    if recalled is not None:
      erased = self.after.erases[..., -1, :, None] * recalled
      if self.weights is None:
        terms = terms + erased
      else:
        terms = jnp.concatenate([terms, erased], axis=-2)
        wrote = jnp.concatenate([wrote, self.U], axis=-2)
    begin = self.D
    if self.packed is not None:
      carried = self.packed.carried[..., -1:, None]
      begin = jnp.where(carried, begin, self.fresh)
    change = _matmul(jnp.swapaxes(wrote, -1, -2), terms)
    W = self.after.base[..., -1, None, None] * begin - change
    W = W if self.R is None else W + self.R
    if self.S is None:
      return W, None
    W = W + self.after.momentum[..., -1, None, None] * self.S
    kept = jnp.exp(self.momentum[..., -1])
    if self.packed is not None:
      kept = jnp.where(self.packed.carried[..., -1], kept, 0.0)
    last = self.momentum_decays[..., -1:, :] * self.write[..., None, :]
    steps = self._spread(last)[..., 0, :, None] * self.Delta
    change = _matmul(jnp.swapaxes(self.written, -1, -2), steps)
    S = kept[..., None, None] * self.S - change
    return W, S


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
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """The exact chunk form; arguments and results as `api.rank_one`."""
  chunk = _Chunk(U, Delta, gates, W, S, R, start, segment_ids, window)
  recalled = None if gates[3] is None else chunk.recall(erase_of)
  anchor = W if anchor is None else anchor
  reads = None
  if Q is not None and read == "chunk_start":
    reads = chunk.read_anchor(Q, anchor)
  elif Q is not None:
    gain = chunk.after if read == "after" else chunk.before
    reads = chunk.read(Q, gain, recalled)
    if row is not None:
      still = chunk.read_anchor(Q, anchor)
      reads = still + row[..., None] * (reads - still)
  return reads, *chunk.end(recalled)
