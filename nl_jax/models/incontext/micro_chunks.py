"""The two walks of `incontext` over micro-chunks, and what they carry.

`whole` reads rows from their start: nested scans over the micro-chunks that a
later token closes, then the open one. `go_on` reads rows from wherever they
stand, in pieces that end with micro-chunks; a micro-chunk is closed by reading
it again from the buffer. Both give the same numbers.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import levels as runner
from nl_jax import types
from nl_jax.models import cms, layers, lm
from nl_jax.models.incontext import contract, open_chunk


class InContextState(NamedTuple):
  """What a model carries from call to call, apart from its slow weights.

  Attributes:
    layers: states of the mixers, leaves [L,B,...]: "slow", of those that no
      fast level is before; "begin" and "now", of the others at the start of
      the open micro-chunk and after the last token.
    levels: `LevelState` of each fast level, leaves [B,...].
    buffer: the open micro-chunk.
    position_B: int32, real tokens seen, at most 2^31 - 1.
  """

  layers: dict[str, Any]
  levels: runner.State
  buffer: open_chunk.Buffer
  position_B: types.Array


class Unit(NamedTuple):
  """A micro-chunk of one sequence, as the inner loss takes it.

  Attributes:
    x_CxD: residual stream before the first fast level.
    ids_C: int32 documents, or None: no padding, one document.
    targets_C: int32, the token after each.
    weights_C: of their losses.
    there: bool, whether it is closed in this call.
  """

  x_CxD: types.Array
  ids_C: types.Array | None
  targets_C: types.Array
  weights_C: types.Array
  there: types.Array


def begin_levels(
  model: contract.Learner, params: types.Params, mixers: Any
) -> runner.State:
  """The levels of one sequence before its first token.

  Args:
    params: of `init`.
    mixers: states of the mixers after fast levels, or arrays like them.
  """
  base, C = model.base, model.options.chunks[0]
  dtype = layers.activation_dtype(base.dtype, params)
  unit = Unit(
    jnp.zeros((C, base.width), dtype),
    jnp.zeros((C,), jnp.int32),
    jnp.zeros((C,), jnp.int32),
    jnp.zeros((C,), layers.at_least_float32(dtype)),
    jnp.zeros((), bool),
  )
  return runner.nested_init(
    model.rules(params), model.theta(params), (mixers, mixers), unit
  )


def _fast(
  model: contract.Learner,
  params: types.Params,
  theta: Mapping[str, types.Params],
  state: Any,
  x_CxD: types.Array,
  ids_C: types.Array | None,
) -> tuple[types.Array, Any, dict[str, Any], dict[str, Any]]:
  """The levels of the fast layers of one sequence, and mixers between them.

  Returns:
    The residual stream [C,D], the mixers' states, metrics, and by level
    what its kernels read.
  """
  one = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
  blocks = model.split(params["blocks"])[1]
  feed_forward = dict(blocks["cms"])
  for name, kernels in theta.items():
    feed_forward[name] = {**feed_forward[name], **kernels}
  blocks = {**blocks, "cms": feed_forward}
  ids = None if ids_C is None else ids_C[None]

  def levels(block: types.Params, x: types.Array) -> tuple[types.Array, Any]:
    x, read = cms.apply_and_tell(
      block["cms"], x, model.base.cms, model.base.norm_epsilon
    )
    return x, read if model.options.rule == "dgd" else {}

  def layer(x: types.Array, scanned: Any) -> tuple[types.Array, Any]:
    block, mixer_state = scanned
    x, mixer_state, metrics = model.inner.mix(block, x, mixer_state, ids)
    x, read = levels(block, x)
    return x, (mixer_state, metrics, read)

  alone = lambda tree: jax.tree.map(lambda x: x[:, 0], tree)
  first = jax.tree.map(lambda x: x[0], blocks)
  others = jax.tree.map(lambda x: x[1:], blocks)
  x, read = levels(first, x_CxD[None])
  read = jax.tree.map(lambda x: x[None], read)
  if model.fast_layers == 1:
    return x[0], state, {}, alone(read)
  x, (state, metrics, more) = jax.lax.scan(layer, x, (others, one(state)))
  join = lambda a, b: jnp.concatenate([a, b])
  read = jax.tree.map(join, read, more)
  return x[0], alone(state), alone(metrics), alone(read)


def _loss(
  model: contract.Learner, params: types.Params, with_logits: bool
) -> runner.LossFn:
  """The inner loss of a micro-chunk; its carry is (begin, now)."""

  def loss_fn(
    theta: dict[str, types.Params], carry: Any, unit: Unit
  ) -> tuple[types.Array, Any]:
    begin, now = carry
    x, new, metrics, read = _fast(
      model, params, theta, now, unit.x_CxD, unit.ids_C
    )
    logits = model.base.logits(params, x[None])[0]
    chosen = jnp.take_along_axis(logits, unit.targets_C[:, None], -1)[:, 0]
    nats = jax.nn.logsumexp(logits, -1) - chosen
    loss = jnp.sum(unit.weights_C * nats)
    if model.options.rule == "dgd":
      loss += _erase(theta, read, unit.weights_C)
    weight = jnp.where(unit.there, jnp.sum(unit.weights_C), -1)
    keep = lambda x, y: jnp.where(unit.there, x, y)
    begin = jax.tree.map(keep, new, begin)
    output = (logits, metrics) if with_logits else ()
    return loss, ((begin, new), weight, output)

  return loss_fn


def whole(
  model: contract.Learner,
  params: types.Params,
  x_BxTxD: types.Array,
  tokens_BxT: types.Array,
  ids_BxT: types.Array | None,
  learn_BxT: types.Array,
  state: None,
) -> tuple[types.Array, InContextState, dict[str, Any]]:
  """Rows from their start: one scan a level, then the open micro-chunk.

  Args:
    model, params: see `incontext`.
    x_BxTxD: residual stream before the first fast level.
    tokens_BxT, ids_BxT: int32; ids None: no padding, one document.
    learn_BxT: weights of the tokens' losses.
    state: None.

  Returns:
    logits, the state after the call but for "slow", and metrics of the mixers.
  """
  del state
  batch, tokens = tokens_BxT.shape
  C = model.options.chunks[0]
  count = (tokens - 1) // C  # Micro-chunks that a later token may close.
  ids = jnp.ones_like(tokens_BxT) if ids_BxT is None else ids_BxT
  if model.options.nested_meta == "full":
    ids_BxT = ids  # What is kept of a text has documents.
  end_B = layers.real_span(ids > 0)[1]
  closed_B = jnp.maximum(end_B - 1, 0) // C
  targets, weights = _targets(model, tokens_BxT, ids, learn_BxT)
  call = Unit(
    x_BxTxD,
    ids_BxT,
    targets,
    weights,
    jnp.arange(count)[None] < closed_B[:, None],
  )
  cut = lambda x: x[:, : count * C].reshape((batch, count, C) + x.shape[2:])
  units = Unit._make([*jax.tree.map(cut, call[:4]), call.there])
  rest = jax.tree.map(lambda x: x[:, count * C :], call[:2])
  start = model.base.init_state(params, 1, tokens).layers
  start = model.split_mixers(start)[1]
  start = jax.tree.map(lambda x: x[:, 0], start)

  def row(units: Any, rest: tuple) -> Any:
    at, (begin, now), (logits, metrics) = _read(model, params, start, units)
    if model.options.reset == "document" and count and rest[1] is not None:
      new = (rest[1][0] > 0) & (rest[1][0] != units.ids_C[-1, 0])
      at = _choose(new, begin_levels(model, params, start), at)
    theta = {name: at[name].params for name in at}
    x, now, last, _ = _fast(model, params, theta, now, *rest)
    total = lambda a, b: jnp.sum(a, axis=0) + b
    metrics = jax.tree.map(total, metrics, last)
    logits = logits.reshape((count * C,) + logits.shape[2:])
    return at, begin, now, logits, x, metrics

  at, begin, now, logits, x, metrics = jax.vmap(
    row, out_axes=(0, 1, 1, 0, 0, 1)
  )(units, rest)
  logits = jnp.concatenate([logits, model.base.logits(params, x)], axis=1)
  buffer = open_chunk.of_call(
    model, x_BxTxD, tokens_BxT, ids, learn_BxT, closed_B, end_B
  )
  seen = jnp.sum(ids > 0, axis=1, dtype=jnp.int32)
  mixers = {"slow": None, "begin": begin, "now": now}
  return logits, InContextState(mixers, at, buffer, seen), metrics


def _read(
  model: contract.Learner,
  params: types.Params,
  start: Any,
  units: Unit,
) -> tuple[runner.State, Any, Any]:
  """The micro-chunks of one sequence that may be closed in this call."""
  made, loss_fn = model.rules(params), _loss(model, params, True)
  first_order = model.options.outer == "first_order"
  at, carry = begin_levels(model, params, start), (start, start)
  if model.options.reset == "sequence" or units.ids_C is None:
    return runner.nested_scan(
      loss_fn, made, at, carry, units, fresh=True, first_order=first_order
    )
  # A document begins with a micro-chunk, and with reset fast weights.
  first = units.ids_C[:, 0]
  before = jnp.concatenate([first[:1], first[:-1]])
  anew = begin_levels(model, params, start)

  def step(held: Any, scanned: Any) -> tuple[Any, Any]:
    (at, carry), (unit, new) = held, scanned
    at = _choose(new, anew, at)
    at, carry, output = runner.nested_step(
      loss_fn, made, at, carry, unit, first_order=first_order
    )
    return (at, carry), output

  new = (first != before) & (first > 0)
  step = jax.checkpoint(step, prevent_cse=False)
  (at, carry), output = jax.lax.scan(step, (at, carry), (units, new))
  return at, carry, output


def _targets(
  model: contract.Learner,
  tokens: types.Array,
  ids: types.Array,
  learn: types.Array,
) -> tuple[types.Array, types.Array]:
  """Targets [B,T] and their weights: the next token of the document."""
  after = lambda x: jnp.concatenate(
    [x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1
  )
  same = (ids > 0) & (after(ids) == ids)
  if model.options.targets == "inside":
    C = model.options.chunks[0]
    same &= (jnp.arange(tokens.shape[1]) % C != C - 1)[None]
  return after(tokens), jnp.where(same, learn, 0)


def go_on(
  model: contract.Learner,
  params: types.Params,
  x_BxTxD: types.Array,
  tokens_BxT: types.Array,
  ids_BxT: types.Array | None,
  learn_BxT: types.Array,
  state: InContextState,
) -> tuple[types.Array, InContextState, dict[str, Any]]:
  """Rows from wherever they stand, in pieces that end with micro-chunks.

  Args, results: as of `whole`, with the state of the call before.
  """
  batch, tokens = tokens_BxT.shape
  C, by_document = model.options.chunks[0], model.options.reset == "document"
  documents = ids_BxT is not None and by_document
  if ids_BxT is None:
    ids_BxT = jnp.broadcast_to(
      jnp.maximum(open_chunk.segment(state.buffer), 1)[:, None], (batch, tokens)
    )
  begin_B, end_B = layers.real_span(ids_BxT > 0)
  width = min(tokens, C)
  count = 1 + -(-(tokens - 1) // C)
  if documents and model.at_edge and tokens % C == 0:
    count = 2 * tokens // C  # Of each micro-chunk a document, and padding.
  elif documents:
    count = tokens  # They may begin, and end micro-chunks, anywhere.
  pad = lambda x: jnp.pad(x, [(0, 0), (0, width)] + [(0, 0)] * (x.ndim - 2))
  call = tuple(map(pad, (x_BxTxD, tokens_BxT, ids_BxT, learn_BxT)))
  take = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, width))
  rows = jnp.arange(batch)[:, None]

  def piece(held: Any, _: None) -> tuple[Any, Any]:
    at, begin, now, buffer, out, offset_B = held
    x, ids_tokens, ids, learn = (take(part, offset_B) for part in call)
    more = offset_B < end_B
    blank = jnp.zeros_like(more)
    if by_document:
      # Micro-chunks end with their document; what is between is not a part.
      blank = ids[:, 0] == 0
      inside = jnp.cumprod(ids == ids[:, :1], axis=1, dtype=jnp.int32)
      before, more = open_chunk.segment(buffer), more & ~blank
      new = more & (before > 0) & (ids[:, 0] != before)
      anew = jax.vmap(lambda x: begin_levels(model, params, x), in_axes=1)(now)
      at = _choose(new, anew, at)
      buffer = jax.tree.map(lambda x: open_chunk.where_rows(~new, x, 0), buffer)
      begin = _choose(new, now, begin, axis=1)
    due = more & (buffer.phase_B == C)
    at, begin, buffer = jax.lax.cond(
      jnp.any(due),
      functools.partial(_close, model, params),
      lambda at, begin, now, buffer, *_: (at, begin, buffer),
      *(at, begin, now, buffer, due, ids_tokens[:, 0], ids[:, 0]),
    )
    room_B = jnp.where(blank, width, C - buffer.phase_B)
    size_B = jnp.clip(jnp.minimum(end_B - offset_B, room_B), 0, width)
    if by_document:
      size_B = jnp.minimum(size_B, inside.sum(axis=1, dtype=jnp.int32))
    real = jnp.arange(width)[None] < size_B[:, None]
    ids = jnp.where(real, ids, 0)
    y, now, metrics = _forward(model, params, at, now, x, ids)
    added_B = jnp.where(blank, 0, size_B)
    buffer = open_chunk.append(buffer, (x, ids_tokens, ids, learn), added_B)
    place = jnp.where(real, offset_B[:, None] + jnp.arange(width)[None], tokens)
    out = out.at[rows, place].set(y, mode="drop")
    return (at, begin, now, buffer, out, offset_B + size_B), metrics

  held = (
    state.levels,
    state.layers["begin"],
    state.layers["now"],
    state.buffer,
    jnp.zeros_like(x_BxTxD),
    begin_B,
  )
  held, metrics = jax.lax.scan(piece, held, None, length=count)
  at, begin, now, buffer, out, _ = held
  seen = jnp.sum(ids_BxT > 0, axis=1, dtype=jnp.int32)
  mixers = {"slow": None, "begin": begin, "now": now}
  return (
    model.base.logits(params, out),
    InContextState(mixers, at, buffer, lm.counted(state.position_B, seen)),
    jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics),
  )


def _forward(
  model: contract.Learner,
  params: types.Params,
  at: runner.State,
  now: Any,
  x: types.Array,
  ids: types.Array,
) -> tuple[types.Array, Any, dict[str, Any]]:
  """The fast layers of all rows, each with its own fast weights."""
  theta = {name: at[name].params for name in at}
  run = lambda theta, now, x, ids: _fast(model, params, theta, now, x, ids)[:3]
  return jax.vmap(run, in_axes=(0, 1, 0, 0), out_axes=(0, 1, 1))(
    theta, now, x, ids
  )


def _close(
  model: contract.Learner,
  params: types.Params,
  at: runner.State,
  begin: Any,
  now: Any,
  buffer: open_chunk.Buffer,
  due_B: types.Array,
  next_token_B: types.Array,
  next_id_B: types.Array,
) -> tuple[runner.State, Any, open_chunk.Buffer]:
  """Closes the full micro-chunks of the rows that are due."""
  behind = lambda x, last: jnp.concatenate([x, last[:, None]], axis=1)
  targets, weights = _targets(
    model,
    behind(buffer.tokens_BxC, next_token_B),
    behind(buffer.ids_BxC, next_id_B),
    behind(buffer.learn_BxC, jnp.zeros_like(buffer.learn_BxC[:, 0])),
  )
  units = Unit(
    buffer.x_BxCxD, buffer.ids_BxC, targets[:, :-1], weights[:, :-1], due_B
  )
  made, loss_fn = model.rules(params), _loss(model, params, False)

  def row(at: runner.State, begin: Any, unit: Unit) -> runner.State:
    return runner.nested_step(
      loss_fn,
      made,
      at,
      (begin, begin),
      unit,
      first_order=model.options.outer == "first_order",
    )[0]

  at = jax.vmap(row, in_axes=(0, 1, 0))(at, begin, units)
  begin = _choose(due_B, now, begin, axis=1)
  empty = lambda x: open_chunk.where_rows(~due_B, x, 0)
  return at, begin, jax.tree.map(empty, buffer)


def _erase(
  theta: Mapping[str, types.Params],
  read: Mapping[str, Any],
  weights_C: types.Array,
) -> types.Array:
  """1/2 sum_t w_t |sg(u_t) W|² over all kernels of the fast levels."""
  total: Any = 0.0
  for name, kernels in theta.items():
    for kernel, w in kernels.items():
      u = read[name]["hidden" if kernel == "w_down" else "x"]
      u = jax.lax.stop_gradient(u).astype(w.dtype)
      square = jnp.square(jnp.einsum("lca,lab->lcb", u, w))
      total += 0.5 * jnp.einsum("c,lcb->", weights_C.astype(w.dtype), square)
  return total


def _choose(rows: types.Array, new: Any, old: Any, axis: int = 0) -> Any:
  """Some rows of `new`, the others of `old`; scalar `rows`: all or none."""

  def one(x: types.Array, y: types.Array) -> types.Array:
    if rows.ndim == 0:
      return jnp.where(rows, x, y)
    shape = [1] * y.ndim
    shape[axis] = rows.shape[0]
    return jnp.where(rows.reshape(shape), x, y)

  return jax.tree.map(one, new, old)
