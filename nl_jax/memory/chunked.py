"""The walk over chunks, once for all memories (model.md 2.4, 2.6, 2.7).

A call lays its T tokens on a grid of chunks of C. Each row goes on where its
last call stopped: `phase` masked tokens are laid before its own, unless its
first real token begins a new document, which then falls on a chunk edge. A
masked token is an exact no-op, so every row can have its own grid.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels.rank_one import segments
from nl_jax.memory import muon, window
from nl_jax.memory import rule as rules


class MemoryState(NamedTuple):
  """Fast weights of a batch of sequences, and where each one stands.

  Attributes:
    anchor: dict of [B, H, a, b], at least float32: the weights at the last
      chunk edge, where gradients are taken.
    w: the same, the weights now; with a row factor (see `walk`) without it,
      until the chunk is full.
    s: momentum, the same, and with a window the tokens of `memory.window`; an
      empty dict without both. With `inner_muon` also `muon.RATE`.
    phase: int32 [B], tokens in the open chunk.
    segment: int32 [B], id of the last real token; 0 where there was none.
  """

  anchor: dict[str, jax.Array]
  w: dict[str, jax.Array]
  s: dict[str, jax.Array]
  phase: jax.Array
  segment: jax.Array


def start(
  params: dict[str, jax.Array], batch: int, rule: rules.Rule
) -> MemoryState:
  """Fast weights at the start of a sequence: copies of the learned start."""

  def copy(W: jax.Array) -> jax.Array:
    W = W.astype(jnp.promote_types(W.dtype, jnp.float32))
    return jnp.broadcast_to(W[None], (batch, *W.shape))

  w = jax.tree.map(copy, dict(params))
  s = jax.tree.map(jnp.zeros_like, w) if rule.has_momentum else {}
  if rule.omega > 1:
    s |= window.start(w, rule.omega, rules.INPUT_LAYERS)
  if rule.inner_muon == "chunk":
    s |= muon.start(w)
  clock = jnp.zeros((batch,), jnp.int32)
  return MemoryState(anchor=w, w=w, s=s, phase=clock, segment=clock)


def by_row(params: Any, batch: int) -> Any:
  """Slow parameters as a copy for each row of a batch, [B, ...].

  What a walk reads inside its scan comes from here: its gradient is then
  summed over rows once, behind the scan, and not over devices in every chunk.
  """
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), params
  )


class _Grid(NamedTuple):
  """Where a call's tokens lie, and what happens at each block of c tokens.

  Attributes:
    offset: int32 [B], masked tokens before the call's own, < c.
    place: int32 [B], tokens in the row's open chunk before the call.
    ids: int32 [N, B, c], documents of the call, counted from 1; 0 = masked.
    resets: bool [N, B], the row begins a new document with this block.
    closes: bool [N, B], the row's open chunk is full after this block.
    phase, segment: int32 [B], the clocks after the call.
  """

  offset: jax.Array
  place: jax.Array
  ids: jax.Array
  resets: jax.Array
  closes: jax.Array
  phase: jax.Array
  segment: jax.Array


def _lay(x: jax.Array, offset: jax.Array, blocks: int, c: int) -> jax.Array:
  """[B, T, ...] to [N, B, c, ...], row b shifted right by offset[b] < c."""
  B, T = x.shape[:2]
  size = blocks * c
  x = jnp.pad(x, [(0, 0), (c - 1, max(size - T, 0)), *[(0, 0)] * (x.ndim - 2)])
  take = lambda row, o: jax.lax.dynamic_slice_in_dim(row, c - 1 - o, size)
  x = jax.vmap(take)(x, offset)
  return jnp.moveaxis(x.reshape(B, blocks, c, *x.shape[2:]), 1, 0)


def _fold(x: jax.Array, blocks: int, c: int) -> jax.Array:
  """`_lay` where every offset is 0."""
  B, T = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, blocks * c - T), *[(0, 0)] * (x.ndim - 2)])
  return jnp.moveaxis(x.reshape(B, blocks, c, *x.shape[2:]), 1, 0)


def _unlay(y: jax.Array, offset: jax.Array | None, T: int) -> jax.Array:
  """[N, B, c, ...] back to [B, T, ...]."""
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], -1, *y.shape[3:])
  if offset is None:
    return y[:, :T]
  take = lambda row, o: jax.lax.dynamic_slice_in_dim(row, o, T)
  return jax.vmap(take)(y, offset)


def _first(state: MemoryState, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[B]: place of the call's first real token, and if it begins a document."""
  real = ids != 0
  lead = jnp.argmax(real, axis=1)
  first = jnp.take_along_axis(ids, lead[:, None], axis=1)[:, 0]
  return lead, real.any(axis=1) & (first != state.segment)


def places(
  state: MemoryState, segment_ids: jax.Array | None, tokens: int, chunk: int
) -> jax.Array:
  """int32 [B, T], the place of each token in its chunk, 0 to C - 1.

  Args:
    state: where the sequences stand before the call.
    segment_ids: int32 [B, T] or None, as `walk`.
    tokens: T.
    chunk: C.
  """
  begin = state.phase
  if segment_ids is not None:
    lead, new = _first(state, segment_ids)
    begin = jnp.where(new, -lead % chunk, begin)
  return (begin[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]) % chunk


def _grid(
  state: MemoryState,
  ids: jax.Array,
  chunk: int,
  blocks: int,
  c: int,
  shifts: bool,
) -> _Grid:
  """The grid of a call with document ids [B, T] (0 = padding)."""
  B, T = ids.shape
  real = ids != 0
  any_real = real.any(axis=1)

  def id_at(position: jax.Array) -> jax.Array:
    return jnp.take_along_axis(ids, position[:, None], axis=1)[:, 0]

  lead, new = _first(state, ids)
  last = T - 1 - jnp.argmax(real[:, ::-1], axis=1)
  phase = jnp.where(new, -lead % chunk if shifts else 0, state.phase)
  consumed = phase + jnp.where(any_real, last + 1, 0)
  offset = phase.astype(jnp.int32) if shifts else jnp.zeros_like(phase)

  laid = jnp.moveaxis(_lay(ids, offset, blocks, c), 0, 1)
  index = segments.running_index(laid.reshape(B, -1), state.segment)
  index = index.reshape(B, blocks, c)
  ends = jnp.pad(index[:, :-1, -1], [(0, 0), (1, 0)])
  head = jnp.argmax(laid != 0, axis=2)[..., None]
  head = jnp.take_along_axis(index, head, axis=2)[..., 0]
  edges = chunk * (1 + jnp.arange(blocks)[:, None])
  return _Grid(
    offset=offset,
    place=phase.astype(jnp.int32),
    ids=jnp.moveaxis(jnp.where(laid != 0, index + 1, 0), 1, 0),
    resets=((laid != 0).any(axis=2) & (head != ends)).T,
    closes=any_real[None] & (consumed[None] >= edges),
    phase=jnp.where(any_real, consumed % chunk, state.phase).astype(jnp.int32),
    segment=jnp.where(any_real, id_at(last), state.segment),
  )


def _select(rows: jax.Array, x: Any, y: Any) -> Any:
  """x in the rows [B] that are set, y elsewhere."""
  pick = lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (b.ndim - 1)), a, b)
  return jax.tree.map(pick, x, y)


Body = Callable[..., tuple[Any, Any, Any, rules.Metrics]]


class _Call(NamedTuple):
  """What holds for all blocks of a call.

  Attributes:
    body, rule, fresh: of `walk`.
    begins: dict of [B, H, a, b], the learned start, as each row's own.
    factor: [B or 1, H or 1, c], how much of a write a token sees; None is 1.
    last: [B, H, 1, 1], the same at a chunk's last token.
    first: bool [B or 1, 1], a block is the first of its chunk.
    segmented: documents may begin in the call.
    exact: they may begin inside a block.
  """

  body: Body
  rule: rules.Rule
  fresh: bool
  begins: dict[str, jax.Array]
  factor: jax.Array | None
  last: jax.Array | None
  first: jax.Array
  segmented: bool
  exact: bool


_Weights = tuple[dict[str, jax.Array], dict[str, jax.Array], Any]


def _block(call: _Call, carry: _Weights, x: Any) -> tuple[_Weights, Any]:
  """One block: from (anchor, w, s) to the next, and (ys, metrics)."""
  anchor, w, s = carry
  ids, resets, closes, xs = x
  rule, begins, fresh = call.rule, call.begins, call.fresh
  if rule.stop_grad_writes:
    w = jax.tree.map(lambda r, v: r + jax.lax.stop_gradient(v - r), begins, w)
    s = jax.lax.stop_gradient(s)
  if call.segmented:
    s = _select(resets, jax.tree.map(jnp.zeros_like, s), s)
    anchor, w = _select(resets, (begins, begins), (anchor, w))
  # From a fresh start every block begins on a chunk edge, where the anchor
  # is w; only a row's first block of a later call may be in an open chunk.
  now = left = w if fresh else anchor
  carried = None
  if call.exact:
    index = segments.running_index(ids, jnp.zeros_like(ids[:, 0]))
    carried = (index == 0)[:, None, :, None]
    left = _select(index[:, -1] != 0, begins, now)
  block = rules.Block(
    now, w, s, begins, (ids != 0)[:, None],
    ids[:, None] if call.exact else None, carried, call.factor, call.first,
  )  # fmt: skip
  ys, w, s, metrics = call.body(block, xs)
  # After a row's last token only its clocks stand still: w is no edge.
  kept = _select((ids != 0).any(axis=1), left, anchor) if fresh else left
  if call.last is not None:
    edge = jax.tree.map(lambda a, b: a + call.last * (b - a), left, w)
    w = _select(closes, edge, w)
  if rule.inner_muon == "chunk":
    # While no chunk ends, as while single tokens are read, nothing is made.
    moved = jax.lax.cond(closes.any(), muon.move, lambda w, s: w, w, s)
    w = _select(closes, moved, w)
  anchor = _select(closes, w, kept)
  return (anchor, w, s), (ys, metrics)


def walk(
  body: Body,
  state: MemoryState,
  params: dict[str, jax.Array],
  xs: Any,
  *,
  rule: rules.Rule,
  segment_ids: jax.Array | None = None,
  fresh: bool = False,
  aligned: bool = False,
  row: jax.Array | None = None,
) -> tuple[Any, MemoryState, rules.Metrics]:
  """Runs `body` over the chunks of a call.

  Args:
    body: (block, xs) -> (ys, w, s, metrics); leaves of xs and ys are
      [B, H, C, ...] inside it.
    state: where the sequences stand.
    params: the learned start, dict of [H, a, b].
    xs: tree of [B, T, H, ...].
    rule: chunk length, remat group, stop_grad_writes.
    segment_ids: int32 [B, T], 0 is padding; None continues `state.segment`.
    fresh: the caller knows that `state` is `start(...)`: spares the shift to
      each row's grid.
    aligned: the caller knows that documents begin at multiples of C of the
      grid: spares a second gradient point a chunk. A document that begins
      elsewhere would read the one before it until the next edge.
    row: [C], by place in the chunk: a token sees anchor + row_t (w - anchor),
      the next chunk begins from anchor + row_C (w - anchor). TTT's step size,
      which shrinks as more tokens of a chunk are summed. None is 1.

  Returns:
    (ys [B, T, H, ...], state, metrics summed over the call).
  """
  B, T = jax.tree.leaves(xs)[0].shape[:2]
  C = rule.chunk
  c = 1 if T == 1 else C
  shifts = c > 1 and not (fresh and (aligned or segment_ids is None))
  blocks = -(-(T + (c - 1) * shifts) // c)
  ids = segment_ids
  if ids is None:
    ids = jnp.where(state.segment == 0, 1, state.segment)[:, None]
    ids = jnp.broadcast_to(ids, (B, T))
  grid = _grid(state, ids, C, blocks, c, shifts)
  begins = by_row(params, B)
  begins = jax.tree.map(lambda W, w: W.astype(w.dtype), begins, state.w)
  factor = last = None
  if row is not None:
    H = jax.tree.leaves(state.w)[0].shape[1]
    row_BxHxC = by_row(jnp.broadcast_to(row[None], (H, C)), B)
    last = row_BxHxC[:, :, -1, None, None]
    factor = row_BxHxC if c == C else row[grid.place][:, None, None]
  # A block is a chunk, or the one token of a call.
  first = jnp.ones((1, 1), bool) if c == C else grid.place[:, None] == 0
  segmented = segment_ids is not None
  call = _Call(
    body, rule, fresh, begins, factor, last, first, segmented,
    exact=segmented and not aligned and c > 1,
  )  # fmt: skip

  def lay(x: jax.Array) -> jax.Array:
    x = _lay(x, grid.offset, blocks, c) if shifts else _fold(x, blocks, c)
    real = (grid.ids != 0).reshape(*grid.ids.shape, *(1,) * (x.ndim - 3))
    return jnp.moveaxis(jnp.where(real, x, 0), 2, 3)

  xs = (grid.ids, grid.resets, grid.closes, jax.tree.map(lay, xs))
  group = max(g for g in range(1, rule.remat_group + 1) if blocks % g == 0)
  fold = lambda x: x.reshape(blocks // group, group, *x.shape[1:])
  step = functools.partial(_block, call)
  scan = lambda carry, x: jax.lax.scan(step, carry, x)
  carry, ys = jax.lax.scan(
    jax.checkpoint(scan, prevent_cse=False),
    (state.anchor, state.w, state.s),
    jax.tree.map(fold, xs),
  )
  ys, metrics = jax.tree.map(lambda y: y.reshape(blocks, *y.shape[2:]), ys)
  metrics = jax.tree.map(lambda m: m.sum(axis=0), metrics)
  offset = grid.offset if shifts else None
  back = lambda y: _unlay(jnp.moveaxis(y, 3, 2), offset, T)
  state = MemoryState(*carry, grid.phase, grid.segment)
  return jax.tree.map(back, ys), state, metrics


@jax.named_scope("memory")
def update(
  forward: rules.Forward,
  params: dict[str, jax.Array],
  state: MemoryState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: rules.Gates,
  *,
  rule: rules.Rule,
  target: Callable[[rules.Block, jax.Array], jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
  fresh: bool = False,
  aligned: bool = False,
  row: jax.Array | None = None,
) -> tuple[jax.Array, MemoryState, rules.Metrics]:
  """Writes T tokens into a memory and reads it at each (model.md 2.3-2.7).

  Args:
    forward: the memory's architecture, see `rule`.
    params: the learned start, dict of [H, a, b].
    state: where the sequences stand.
    q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
    gates: raw, [B, T, H] each.
    rule: how it learns.
    target: (block, v [B, H, C, V]) -> what the memory is to learn; default v.
    segment_ids, fresh, aligned, row: as `walk`.
    implementation: of `rank_one`.

  Returns:
    (reads [B, T, H, V], state, metrics).

  Raises:
    ValueError: momentum without log_beta, a window without gamma, or the
      other way round.
  """
  if rule.has_momentum != (gates.log_beta is not None):
    raise ValueError(
      f"memory.momentum={rule.momentum!r} and "
      f"{'no ' if gates.log_beta is None else ''}gates.log_beta do not fit"
    )
  if (rule.omega > 1) != (gates.gamma is not None):
    raise ValueError(
      f"memory.omega={rule.omega} and "
      f"{'no ' if gates.gamma is None else ''}gates.gamma do not fit"
    )
  dtype = jax.tree.leaves(state.w)[0].dtype
  xs = jax.tree.map(lambda x: x.astype(dtype), (q, k, v, gates))

  def body(block: rules.Block, xs):
    q, k, v, gates = xs
    v = v if target is None else target(block, v)
    reads, w, s, metrics = rules.write_and_read(
      forward, block, rule, q, k, v, gates, implementation=implementation
    )
    return reads, w, s, metrics

  return walk(
    body, state, params, xs,
    rule=rule, segment_ids=segment_ids, fresh=fresh, aligned=aligned,
    row=None if row is None else row.astype(dtype),
  )  # fmt: skip
