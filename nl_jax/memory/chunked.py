"""The walk of all memories over chunks (docs/mathematics.md 2.4, 2.6, 2.7).

A call lays its T tokens on a grid of chunks of C, and `kernels.walk` runs the
memory's chunk function over it. Each row resumes where its last call stopped:
`phase` masked tokens are laid before its own, unless its first real token
begins a new document, which then falls on a chunk edge. A masked token is an
exact no-op, so every row can have its own grid.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nl_jax.kernels import walk as walks
from nl_jax.kernels.rank_one import segments
from nl_jax.memory import block as blocks
from nl_jax.memory import muon, window, writing
from nl_jax.memory import rule as rules


class MemoryState(NamedTuple):
  """Fast weights of a batch of sequences, and where each one stands.

  Weights are kept as deviations from the learned start, so that a memory that
  has read nothing is 0.

  Attributes:
    anchor: dict of [B, H, a, b], at least float32: the deviations at the last
      chunk edge, where gradients are taken.
    w: the same, the deviations now; with a row factor (see `update`) without
      it, until the chunk is full.
    s: momentum, the same; an empty dict without.
    carried: what else continues with a sequence and is 0 at its start: the
      tokens of `memory.window`, the rate of `memory.muon`; else empty.
    phase: int32 [B], tokens in the open chunk.
    segment: int32 [B], id of the last real token; 0 where there was none.
  """

  anchor: dict[str, jax.Array]
  w: dict[str, jax.Array]
  s: dict[str, jax.Array]
  carried: Any
  phase: jax.Array
  segment: jax.Array


class Run(NamedTuple):
  """How a walk runs: fields of the mixers, and where the mesh has its axes.

  Attributes:
    implementation: None, "xla", "pallas_tpu", "pallas_interpret"; also
      "reference", the token loop. A call that resumes from inside a chunk, and
      a single token, run by XLA whatever is named: no kernel takes them.
    spec: mesh axes of [B, T, H d], see `kernels.walk`.
    rate: the largest rate at which a token erases; chooses the policy.
    policy: precision of products, see `kernels.walk`; None: by `rate`, the
      platform and the inputs.
  """

  implementation: str | None = None
  spec: PartitionSpec | None = None
  rate: float = 1.0
  policy: str | None = None


def empty(
  params: Mapping[str, jax.Array],
  batch: int,
  *,
  s: dict[str, jax.Array] | None = None,
  carried: Any = None,
) -> MemoryState:
  """Fast weights of sequences that have read nothing; of any memory.

  Args:
    params: dict of [H, a, b], of which only shapes and types are read.
    batch: B.
    s: momentum, dict of [B, H, a, b]; carried: see `MemoryState`.
  """

  def zeros(W: jax.Array) -> jax.Array:
    wide = jnp.promote_types(W.dtype, jnp.float32)
    return jnp.zeros((batch, *W.shape), wide)

  w = jax.tree.map(zeros, dict(params))
  clock = jnp.zeros((batch,), jnp.int32)
  return MemoryState(w, w, s or {}, carried or {}, clock, clock)


def start(
  params: Mapping[str, jax.Array], batch: int, rule: rules.Rule
) -> MemoryState:
  """Fast weights at the start of a sequence.

  Args:
    params: the learned start, dict of [H, a, b].
    batch: B.
    rule: whether there is momentum, a window or inner Muon.
  """
  state = empty(params, batch)
  w = state.w
  carried: dict[str, Any] = {}
  if rule.omega > 1:
    carried |= window.start(w, rule.omega, rules.INPUT_LAYERS)
  if rule.inner_muon == "chunk":
    carried |= muon.start(w)
  return state._replace(s=w if rule.has_momentum else {}, carried=carried)


class _Grid(NamedTuple):
  """Where a call's tokens lie: N blocks of c tokens a row.

  Attributes:
    offset: int32 [B], masked tokens before the call's own, < c; None: none.
    place: int32 [B], tokens in the row's open chunk before the call.
    real: bool [B, N, c].
    inside: int32 [B, N, c], documents counted within the block from 0.
    resets: bool [B, N], the row begins a new document with this block.
    closes: bool [B, N], the row's open chunk is full after this block.
    phase, segment: int32 [B], the clocks after the call.
  """

  offset: jax.Array | None
  place: jax.Array
  real: jax.Array
  inside: jax.Array
  resets: jax.Array
  closes: jax.Array
  phase: jax.Array
  segment: jax.Array


def _lay(
  x: jax.Array, offset: jax.Array | None, size: int, c: int
) -> jax.Array:
  """[B, T, ...] to [B, size, ...], row b shifted right by offset[b] < c."""
  T = x.shape[1]
  if offset is None:
    return jnp.pad(x, [(0, 0), (0, size - T), *[(0, 0)] * (x.ndim - 2)])
  x = jnp.pad(x, [(0, 0), (c - 1, max(size - T, 0)), *[(0, 0)] * (x.ndim - 2)])
  take = lambda row, o: jax.lax.dynamic_slice_in_dim(row, c - 1 - o, size)
  return jax.vmap(take)(x, offset)


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
  offset = phase.astype(jnp.int32) if shifts else None

  laid = _lay(ids, offset, blocks * c, c)
  index = segments.running_index(laid, state.segment).reshape(B, blocks, c)
  laid = laid.reshape(B, blocks, c)
  ends = jnp.pad(index[:, :-1, -1], [(0, 0), (1, 0)])
  head = jnp.argmax(laid != 0, axis=2)[..., None]
  head = jnp.take_along_axis(index, head, axis=2)[..., 0]
  edges = chunk * (1 + jnp.arange(blocks)[None])
  return _Grid(
    offset=offset,
    place=phase.astype(jnp.int32),
    real=laid != 0,
    inside=segments.running_index(laid, jnp.zeros_like(laid[..., 0])),
    resets=(laid != 0).any(axis=2) & (head != ends),
    closes=any_real[:, None] & (consumed[:, None] >= edges),
    phase=jnp.where(any_real, consumed % chunk, state.phase).astype(jnp.int32),
    segment=jnp.where(any_real, id_at(last), state.segment),
  )


def walk(
  body: walks.Body,
  state: MemoryState,
  slow: Any,
  xs: Any,
  *,
  chunk: int,
  group: int,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  chunk_free: bool = False,
  run: Run | None = None,
  name: str = "walk",
  columns: walks.Columns | None = None,
) -> tuple[Any, MemoryState, Any]:
  """Runs a chunk function over the chunks of a call.

  Args:
    body: (slow, state, x, at) -> (state, y, sums), see `kernels.walk`; the
      state's `w` is that of `state`, its `s` the pair (s, carried).
    state: where the sequences stand.
    slow: tree of [H, a, b], what the chunk function reads of slow parameters.
    xs: tree of [B, T, H, d], or [B, T, H] for gates: [..., C, 1] in the body.
    chunk: C.
    group: chunks between two states that are kept, see `kernels.walk`.
    segment_ids: int32 [B, T], 0 is padding; None continues `state.segment`.
    at_edge: the caller knows that every row stands at a chunk edge: spares the
      shift to each row's grid.
    aligned: the caller knows that documents begin at multiples of C of the
      grid: spares a second gradient point a chunk. A document that begins
      elsewhere would read the one before it until the next edge.
    chunk_free: the chunk is not part of the function.
    run: what runs the walk, and where.
    name: of the kernels.
    columns: of a walk that is affine in its state, see `kernels.walk`.

  Returns:
    (ys [B, T, h d], state, sums [B, H, n] or None).
  """
  B, T = jax.tree.leaves(xs)[0].shape[:2]
  run = run or Run()
  c = 1 if T == 1 else chunk
  # Where the chunk is not part of the function, any token may begin one.
  at_edge = at_edge or chunk_free
  shifts = c > 1 and not (
    at_edge and (aligned or chunk_free or segment_ids is None)
  )
  kernels = at_edge and c > 1 and run.implementation != "reference"
  blocks = -(-(T + (c - 1) * shifts) // c)
  ids = segment_ids
  if ids is None:
    ids = jnp.where(state.segment == 0, 1, state.segment)[:, None]
    ids = jnp.broadcast_to(ids, (B, T))
  grid = _grid(state, ids, chunk, blocks, c, shifts)
  segmented = segment_ids is not None
  exact = segmented and not aligned and c > 1
  places = walks.Places(
    real=grid.real,
    resets=grid.resets if segmented else None,
    closes=grid.closes,
    ids=grid.inside if exact else None,
    first=None if c == chunk else grid.place[:, None] == 0,
  )

  def lay(x: jax.Array) -> jax.Array:
    return _lay(x.reshape(B, T, -1), grid.offset, blocks * c, c)

  ys, after, edges, sums = walks.walk(
    body, slow, jax.tree.map(lay, xs), places,
    state=walks.State(state.w, (state.s, state.carried)),
    anchor=None if at_edge else state.anchor,
    group=group, name=name, chunk_free=chunk_free, spec=run.spec,
    rate=run.rate, policy=run.policy,
    implementation=run.implementation if kernels else "xla",
    columns=columns,
  )  # fmt: skip

  def unlay(y: jax.Array) -> jax.Array:
    if grid.offset is not None:
      take = lambda row, o: jax.lax.dynamic_slice_in_dim(row, o, T)
      y = jax.vmap(take)(y, grid.offset)
    return y[:, :T]

  phase = grid.phase
  if at_edge:  # A row that reads nothing may have ended within a chunk.
    reads = grid.real.any(axis=(1, 2))[:, None, None, None]
    keep = lambda new, old: jnp.where(reads, new, old)
    edges = jax.tree.map(keep, edges, state.anchor)
  if chunk_free:
    edges, phase = after.w, jnp.zeros_like(phase)
  s, carried = after.s
  state = MemoryState(edges, after.w, s, carried, phase, grid.segment)
  return jax.tree.map(unlay, ys), state, sums


@jax.named_scope("memory")
def update(
  forward: rules.Forward,
  params: Mapping[str, jax.Array] | None,
  state: MemoryState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: rules.Gates,
  *,
  rule: rules.Rule,
  slow: Any = None,
  target: Callable[[blocks.Block, jax.Array], jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  chunk_free: bool = False,
  row: jax.Array | None = None,
  run: Run | None = None,
  name: str = "memory",
) -> tuple[jax.Array, MemoryState, rules.Metrics]:
  """Writes T tokens into a memory, reads at each (docs/mathematics.md 2.3-2.7).

  Args:
    forward: the memory's architecture, see `rule`.
    params: the learned start, dict of [H, a, b]; None: it starts empty.
    state: where the sequences stand.
    q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
    gates: raw, [B, T, H] each.
    rule: how it learns.
    slow: what else `forward` reads, tree of [H, a, b]: it is then called with
      slow=, the leaves with the leading axes of a chunk function.
    target: (block, v [..., C, V]) -> what the memory is to learn; default v.
    segment_ids, at_edge, aligned, chunk_free, run, name: as `walk`.
    row: [C], by place in the chunk: a token sees anchor + row_t (w - anchor),
      the next chunk begins from anchor + row_C (w - anchor). TTT's step size,
      which shrinks as more tokens of a chunk are summed. None is 1.

  Returns:
    (reads [B, T, H, V], state, metrics).

  Raises:
    ValueError: momentum without log_beta, a window without gamma, or the
      other way round; a form that the rule does not have.
  """
  if rule.has_momentum != (gates.log_beta is not None):
    raise ValueError(
      f"model.mixer.momentum={rule.momentum!r} and "
      f"{'no ' if gates.log_beta is None else ''}gates.log_beta do not fit"
    )
  if (rule.omega > 1) != (gates.gamma is not None):
    raise ValueError(
      f"model.mixer.omega={rule.omega} and "
      f"{'no ' if gates.gamma is None else ''}gates.gamma do not fit"
    )
  named = None if run is None else run.implementation
  if rule.loops and named not in (None, "reference"):
    raise ValueError(
      f"model.mixer.inner_muon={rule.inner_muon!r} has no chunk form and "
      f"cannot run as {named!r}: use 'reference'"
    )
  B, T, H = q.shape[:3]
  wide = jax.tree.leaves(state.w)[0].dtype
  fixed = {"start": params, "forward": slow}
  xs = {"q": q, "k": k, "v": v, "gates": gates}
  if row is not None:
    seen = row[places(state, segment_ids, T, rule.chunk)]
    xs["row"] = jnp.broadcast_to(seen[..., None], (B, T, H))
    fixed["row"] = jnp.broadcast_to(row[-1], (H, 1, 1))
  fixed = jax.tree.map(lambda x: x.astype(wide), fixed)
  by_token = named == "reference"

  def body(fixed, now: walks.State, x, at: walks.At):
    if rule.stop_grad_writes:
      now = jax.lax.stop_gradient(now)
    s, carried = now.s
    block = blocks.Block(fixed["start"], now.w, s, carried, at)
    architecture: Any = forward
    if slow is not None:
      architecture = functools.partial(architecture, slow=fixed["forward"])
    v = x["v"] if target is None else target(block, x["v"])
    reads, after, sums = writing.write_and_read(
      architecture, block, rule, x["q"], x["k"], v, x["gates"],
      by_token=by_token, factor=x.get("row"),
    )  # fmt: skip
    w = after.w
    if row is not None:
      w = _scaled(block, w, fixed["row"])
    return walks.State(w, (after.s, after.carried)), reads, sums

  columns = None
  alone = slow is None and row is None and target is None and set(state.w)
  if alone == {"w"} and rule.affine and not by_token:
    columns = _columns(forward, rule, v.shape[-1])
  y, state, sums = walk(
    body, state, fixed, xs,
    chunk=rule.chunk, group=rule.remat_group, segment_ids=segment_ids,
    at_edge=at_edge, aligned=aligned, chunk_free=chunk_free, run=run, name=name,
    columns=columns,
  )  # fmt: skip
  return y.reshape(B, T, H, -1), state, blocks.metrics(sums)


def _columns(
  forward: rules.Forward, rule: rules.Rule, width: int
) -> walks.Columns:
  """A matrix memory whose columns, of `width` values, learn on their own."""

  def write(fixed, now: walks.State, x, at: walks.At):
    s, carried = now.s
    block = blocks.Block(fixed["start"], now.w, s, carried, at)
    v, k = x["v"], x["k"]
    if rule.objective == "l2":  # Predicted without weights, this is no goal.
      none = lambda _, z: jnp.zeros((*z.shape[:-1], width), z.dtype)
      base = forward(none, k)
      rest = [(0, 0)] * (v.ndim - 1) + [(0, v.shape[-1] - width)]
      v = v - jnp.pad(base, rest)
    matrix = lambda layer, z: layer("w", z)
    _, after, _ = writing.write_and_read(
      matrix, block, rule, None, k, v, x["gates"]
    )
    return walks.State(after.w, (after.s, after.carried)), (), None

  def widen(fixed, xs, heads: int, count: int):
    behind = lambda w: jnp.pad(w, [(0, 0), (0, 0), (0, count)])
    start = jax.tree.map(behind, fixed["start"])
    xs = xs | {"v": walks.wider(xs["v"], heads, count)}
    return fixed | {"start": start}, xs

  return walks.Columns(write, widen)


def _scaled(
  block: blocks.Block, w: rules.Weights, last: jax.Array
) -> rules.Weights:
  """Where the chunk closes, anchor + last (w - anchor)."""
  at = block.at
  edge = block.w if at.anchor is None else at.anchor
  if at.ids is not None:  # Of a document that began inside it: the start.
    held = jnp.where(at.ids[..., -1:] == 0, 1.0, 0.0)
    edge = jax.tree.map(lambda x: held * x, edge)
  scale = lambda e, x: jnp.where(at.closes > 0, e + last * (x - e), x)
  return jax.tree.map(scale, dict(edge), dict(w))
