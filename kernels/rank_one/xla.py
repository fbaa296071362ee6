"""Rank-one memory, all tokens of a chunk at once (docs/mathematics.md 2.5).

Exact. With D = W - R, the retention of a token alpha, the product of those of
tokens s + 1 to t written a_t / a_s, and `after` reads,

    W_t = R + a_t D_0 - sum_{s <= t} a_t / a_s u_s^T (write_s delta_s
                                                      + erase_s r_s)

where the rows r_t = u_t D_{t-1} that the erase term takes away solve one unit
lower triangular system a chunk; every W_t is then a known sum of rank-one
terms, which is applied to reads without being formed. Where a token erases at
the rate at which it writes, its row is e_t = delta_t + r_t and both sums are
one:

    (I + (a_{t-1} / a_s) write_s u_t u_s^T) E = a_{t-1} U D_0 + Delta
    W_C = R + a_C D_0 - U^T (a_C / a_s write_s E)

The same code runs inside a TPU kernel: made of products, masks by comparison
and sums alone. There the C x C matrices of `tile.pack` heads are blocks of one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments
from nl_jax.kernels.rank_one.rates import Rates
from nl_jax.kernels.walk import products

_NEVER = -1e30


class _Gains(NamedTuple):
  """Weights of what W_t, or W_{t-1}, is a sum of.

  Attributes:
    base: [..., P, 1], of D at the start; momentum: [..., P, 1] of S, or None.
    decays: [..., P, P], of what token s left; writes: the same, of what it
      wrote by momentum too.
  """

  base: jax.Array
  momentum: jax.Array | None
  decays: jax.Array
  writes: jax.Array


class Tokens:
  """The tokens of a chunk: what they keep, for all its weight matrices.

  Arrays of tokens are [..., C, ·]; those over pairs of tokens are laid flat,
  [..., P, P] with P = C x pack.
  """

  def __init__(
    self,
    log_alpha: jax.Array,
    log_beta: jax.Array | None,
    mask: jax.Array,
    *,
    ids: jax.Array | None = None,
    tile: products.Tile = products.EXACT,
  ):
    """The tokens' gates.

    Args:
      log_alpha, log_beta, mask: of `Rates`.
      ids: [..., 1, C], the document of each token counted within the chunk, 0
        the one that it begins in; a masked token has the one before it. None:
        no document begins.
      tile: precision, and where this runs.
    """
    self.tile, self.size = tile, log_alpha.shape[-2]
    self.real = mask.astype(log_alpha.dtype)
    self.log_alpha = log_alpha * self.real
    self.log_beta = None if log_beta is None else log_beta * self.real
    self.document = None if ids is None else tile.column(ids)
    self._made: dict[Any, Any] = {}

  def flat(self, x: jax.Array) -> jax.Array:
    """[..., C, d] to [..., P, d], where heads are packed."""
    if self.tile.pack == 1:
      return x
    return x.reshape(-1, self.size * self.tile.pack, x.shape[-1])

  def heads(self, x: jax.Array) -> jax.Array:
    """[..., P, d] to [..., C, d]."""
    if self.tile.pack == 1:
      return x
    return x.reshape(-1, self.size, x.shape[-1])

  def _once(self, make: Callable[..., jax.Array], *of: Any) -> jax.Array:
    """make(*of), made once; holds its arguments, so that ids stay theirs."""
    key = (make, *map(id, of))
    if key not in self._made:
      self._made[key] = (make(*of), of)
    return self._made[key][0]

  def row(self, column: jax.Array) -> jax.Array:
    """[..., C, 1] to [..., 1, P]; made once."""
    return self._once(self._row, column)

  def _row(self, column: jax.Array) -> jax.Array:
    return self.tile.row(self.flat(column))

  def applied(self, pairs: jax.Array, rows: jax.Array, kind: str) -> jax.Array:
    """Weights of pairs [..., P, ·] times rows of tokens, [..., C, b]."""
    return self.heads(self.tile.mm(pairs, self.flat(rows), "nn", kind))

  def gram(self, X: jax.Array, Y: jax.Array, kind: str) -> jax.Array:
    """Products of all rows of X and Y, [..., P, P]; made once."""
    return self._once(self._gram, X, Y, kind)

  def _gram(self, X: jax.Array, Y: jax.Array, kind: str) -> jax.Array:
    return self.tile.mm(self.flat(X), self.flat(Y), "nt", kind)

  def _pairs(self, strict: bool) -> jax.Array:
    """Pairs (t, s <= t) of one head and document, bool [..., P, P]."""
    size = self.size * self.tile.pack
    t = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    s = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    pairs = t > s if strict else t >= s
    if self.tile.pack > 1:
      bits = self.size.bit_length() - 1
      pairs &= (t >> bits) == (s >> bits)
    lead = self.log_alpha.ndim - 2
    pairs = pairs.reshape((1,) * lead + pairs.shape)
    if self.document is None:
      return pairs
    own = self.document
    if self.tile.pack > 1:
      own = self.flat(jnp.broadcast_to(own, self.log_alpha.shape))
    return pairs & (own == self.tile.row(own))

  def _running(self, column: jax.Array) -> jax.Array:
    """Sums over the tokens of t's document up to t, [..., P, 1]."""
    seen = jnp.where(self._pairs(False), self.row(column), 0.0)
    return jnp.sum(seen, axis=-1, keepdims=True)

  def _decays(
    self, rows: jax.Array, columns: jax.Array, strict: bool
  ) -> jax.Array:
    # Masked inside the exponent: exp of a positive difference above the
    # diagonal overflows, and its gradient would be NaN.
    difference = rows - self._once(self.tile.row, columns)
    return jnp.exp(jnp.where(self._pairs(strict), difference, _NEVER))

  @functools.cached_property
  def level(self) -> jax.Array:
    """Log decay since the start of the chunk or document, [..., P, 1]."""
    return self._running(self.log_alpha)

  @functools.cached_property
  def momentum(self) -> jax.Array:
    """The same of momentum."""
    assert self.log_beta is not None
    return self._running(self.log_beta)

  @functools.cached_property
  def momentum_decays(self) -> jax.Array:
    """What is left at t of token s's momentum, [..., P, P]."""
    return self._decays(self.momentum, self.momentum, False)

  @functools.cached_property
  def after(self) -> _Gains:
    """The gains of W_t."""
    return self._gains(self.level, False)

  @functools.cached_property
  def before(self) -> _Gains:
    """The gains of W_{t-1}."""
    return self._gains(self.level - self.flat(self.log_alpha), True)

  @functools.cached_property
  def decayed(self) -> _Gains:
    """The gains of alpha_t W_{t-1}, without momentum."""
    decays = self._decays(self.level, self.level, True)
    return _Gains(jnp.exp(self.level), None, decays, decays)

  def _gains(self, level: jax.Array, strict: bool) -> _Gains:
    """Of the states whose own log decay since their start is `level`."""
    decays = self._decays(level, self.level, strict)
    if self.log_beta is None:
      return _Gains(jnp.exp(level), None, decays, decays)
    decays = decays * self.row(self.real)
    kept = self.tile.row(jnp.exp(self.momentum))
    held = jnp.sum(decays * kept, axis=-1, keepdims=True)
    if self.document is not None:
      held = held * self.flat(self.carried)
    writes = self.tile.mm(decays, self.momentum_decays, "nn", "solve")
    return _Gains(jnp.exp(level), held, decays, writes)

  @functools.cached_property
  def carried(self) -> jax.Array:
    """1 for tokens of the document that the chunk began in, [..., C, 1]."""
    own = jnp.where(self.document == 0, 1.0, 0.0).astype(self.real.dtype)
    return jnp.broadcast_to(own, self.log_alpha.shape)

  def last(self, column: jax.Array) -> jax.Array:
    """A column where the chunk's last document is, else 0."""
    if self.document is None:
      return column
    own = self.document == self.document[..., -1:, :]
    return column * jnp.where(own, 1.0, 0.0)


class Chunk:
  """One weight matrix over one chunk: what is known of every W_t unformed.

  Methods return rows [..., C, b].
  """

  def __init__(
    self,
    tokens: Tokens,
    U: jax.Array,
    Delta: jax.Array,
    write: jax.Array,
    erase: jax.Array | str | None,
    D: jax.Array,
    S: jax.Array | None = None,
    R: jax.Array | None = None,
    *,
    fresh: jax.Array | None = None,
    window: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  ):
    """A chunk before anything is solved.

    Args:
      tokens: of the chunk.
      U, Delta, S, R, window: of `api.rank_one`; write, erase: of `Rates`.
      D: [..., a, b], W - R at the start.
      fresh: [..., a, b], D in which a new document begins; None is 0.
    """
    self.tokens, self.tile = tokens, tokens.tile
    self.U, self.D, self.S, self.R, self.fresh = U, D, S, R, fresh
    self.written, self.Delta = U, Delta
    self.weights: jax.Array | None = None
    if window is not None:
      self.written = jnp.concatenate([window[0], U], axis=-2)
      self.Delta = jnp.concatenate([window[1], Delta], axis=-2)
      self.weights = window[2]
    self.write = write * tokens.real
    self.erase: Any = erase  # An array; None, or with `joint` its name.
    self.joint = isinstance(erase, str) and S is None and window is None
    if isinstance(erase, str) and not self.joint:
      alpha = 1.0 if erase == "write" else jnp.exp(tokens.log_alpha)
      self.erase = self.write * alpha
    elif erase is not None and not self.joint:
      self.erase = erase * tokens.real

  def _writes(self, gain: _Gains) -> jax.Array:
    """Of pairs, times the write rates; of what each write is made of."""
    writes = gain.writes * self.tokens.row(self.write)
    if self.weights is None:
      return writes
    return self.tile.mm(writes, self.weights, "nn", "solve")

  def _base(self, X: jax.Array, gain: _Gains, kind: str) -> jax.Array:
    """What X reads of the start: of each row's own document."""
    tokens = self.tokens
    rows = self.tile.mm(X, self.D, "nn", kind)
    if tokens.document is not None:
      rows = tokens.carried * rows
      if self.fresh is not None:
        begun = self.tile.mm(X, self.fresh, "nn", kind)
        rows = rows + (1.0 - tokens.carried) * begun
    rows = tokens.heads(gain.base) * rows
    if self.S is not None:
      assert gain.momentum is not None
      held = self.tile.mm(X, self.S, "nn", kind)
      rows = rows + tokens.heads(gain.momentum) * held
    return rows

  def system(self) -> tuple[jax.Array, jax.Array]:
    """The triangular system: L [..., P, P], and its right side [..., C, b].

    (I + L) x = right has the rows r that are erased, or with `joint` e.
    """
    tokens = self.tokens
    gram = tokens.gram(self.U, self.U, "gram")
    if self.joint:
      # A decayed erase acts on the state as it is after the token's decay.
      gain = tokens.decayed if self.erase == "decayed" else tokens.before
      right = self._base(self.U, gain, "state") + self.Delta
      return self._writes(gain) * gram, right
    gain = tokens.before
    right = self._base(self.U, gain, "state")
    cross = gram
    if self.weights is not None:
      cross = tokens.gram(self.U, self.written, "gram")
    pairs = self._writes(gain) * cross
    right -= tokens.applied(pairs, self.Delta, "solve")
    return gain.decays * tokens.row(self.erase) * gram, right

  def whole(self, right: jax.Array) -> jax.Array:
    """`right` where the erase acts on W, and not on W - R."""
    if self.R is None:
      return right
    rows = self.tile.mm(self.U, self.R, "nn", "state")
    if self.joint and self.erase == "decayed":
      rows = jnp.exp(self.tokens.log_alpha) * rows
    return right + rows

  def read(self, Q: jax.Array, read: str, rows: jax.Array | None) -> jax.Array:
    """q_t W_t, or q_t W_{t-1} with read="before".

    Args:
      Q: [..., C, a].
      read: "after" or "before".
      rows: of `recall`; None where nothing is erased.
    """
    tokens = self.tokens
    gain = tokens.after if read == "after" else tokens.before
    pairs = self._writes(gain) * tokens.gram(Q, self.written, "read")
    reads = self._base(Q, gain, "read")
    reads = reads - tokens.applied(pairs, self._errors(rows), "read")
    if rows is not None and not self.joint:
      erased = gain.decays * tokens.row(self.erase)
      erased = erased * tokens.gram(Q, self.U, "read")
      reads = reads - tokens.applied(erased, rows, "read")
    if self.R is None:
      return reads
    return reads + self.tile.mm(Q, self.R, "nn", "read")

  def end(self, rows: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """D and S after the last token."""
    tokens = self.tokens
    level = tokens.heads(tokens.level)
    last = level[..., -1:, :]
    left = tokens.last(jnp.exp(last - level))  # a_C / a_s.
    begin = self.D
    if tokens.document is not None:
      alive = tokens.carried[..., -1:, :]
      begin = alive * begin
      if self.fresh is not None:
        begin = begin + (1.0 - alive) * self.fresh
    D, S = jnp.exp(last) * begin, None
    writes = left * self.write
    if self.S is not None:
      kappa = tokens.heads(tokens.momentum)
      final = kappa[..., -1:, :]
      real = left * tokens.real
      held = jnp.sum(real * jnp.exp(kappa), axis=-2, keepdims=True)
      kept, steps = jnp.exp(final), jnp.exp(final - kappa) * self.write
      if tokens.document is not None:
        held, kept = alive * held, alive * kept
      D = D + held * self.S
      steps = self._shares(tokens.last(steps))
      S = kept * self.S - self._wrote(steps * self.Delta)
      decays = tokens.momentum_decays
      spread = self.tile.mm(decays, tokens.flat(real), "tn", "solve")
      writes = tokens.heads(spread) * self.write
    wrote = self._shares(writes) * self._errors(rows)
    if rows is not None and not self.joint:
      erased = left * self.erase * rows
      if self.weights is None:  # Of the same tokens: one product for both.
        wrote = wrote + erased
      else:
        D = D - self.tile.mm(self.U, erased, "tn", "state")
    return D - self._wrote(wrote), S

  def _errors(self, rows: jax.Array | None) -> jax.Array:
    """What is written: what was solved for, with `joint`."""
    return rows if rows is not None and self.joint else self.Delta

  def _shares(self, writes: jax.Array) -> jax.Array:
    """Of each pair that is written, from rates [..., C, 1] of tokens."""
    if self.weights is None:
      return writes
    return self.tile.mm(self.weights, writes, "tn", "solve")

  def _wrote(self, rows: jax.Array) -> jax.Array:
    """sum_s u_s^T rows_s, [..., a, b]."""
    return self.tile.mm(self.written, rows, "tn", "state")


def recall(chunks: Sequence[Chunk], erase_of: str) -> list[jax.Array | None]:
  """Solves the systems of several chunks, with one batch of inverses.

  Args:
    chunks: of equal size and leading axes, on one tile.
    erase_of: "deviation" or "whole".

  Returns:
    Of each the rows that `Chunk.read` and `Chunk.end` take.
  """
  erasing = [chunk for chunk in chunks if chunk.erase is not None]
  if not erasing:
    return [None] * len(chunks)
  systems = [chunk.system() for chunk in erasing]
  rights = [right for _, right in systems]
  if erase_of == "whole":
    rights = [c.whole(right) for c, right in zip(erasing, rights)]
  tokens = erasing[0].tokens
  block = 1 << (tokens.size - 1).bit_length()
  flat = [(L, tokens.flat(x)) for (L, _), x in zip(systems, rights)]
  # L is made of grams in one pass: its gradient needs no more.
  solved = map(tokens.heads, tokens.tile.solve(flat, block, "read"))
  return [None if chunk.erase is None else next(solved) for chunk in chunks]


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
  """The exact chunk form; arguments and results as `api.rank_one`."""
  away = lambda x: x if R is None else x - R
  ids = None
  if segment_ids is not None:
    ids = segments.running_index(segment_ids, segment_ids[..., 0] * 0)
    ids = ids[..., None, :].astype(W.dtype)
  tokens = Tokens(rates.log_alpha, rates.log_beta, rates.mask, ids=ids)
  chunk = Chunk(
    tokens, U, Delta, rates.write, rates.erase, away(W), S, R,
    fresh=None if start is None else away(start), window=window,
  )  # fmt: skip
  (rows,) = recall([chunk], erase_of)
  reads = None
  if Q is not None and read == "chunk_start":
    tile = chunk.tile
    reads = tile.mm(Q, W if anchor is None else anchor)
    if ids is not None and start is not None:
      carried = jnp.swapaxes(ids, -1, -2) == 0
      reads = jnp.where(carried, reads, tile.mm(Q, start))
  elif Q is not None:
    reads = chunk.read(Q, read, rows)
  D, S = chunk.end(rows)
  return reads, D if R is None else D + R, S
