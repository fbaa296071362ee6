"""Local memories that are reset, beside one global memory (TNT).

    y_t = V(q_t) + W_t(q'_t),    q'_t = sum of k (k . q_t) over the span's keys

W learns in short chunks and is reset every S tokens; V, which never is, in
one chunk of S tokens, whose start all of its tokens read. A local memory knows
only the keys of its own span, and is asked only for what lies along them. Spans
do not wait for each other: they are rows of the batch. TNT, arXiv 2511.07343,
of the authors of Titans; one local memory here, with the gates of the global.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nl_jax.memory import chunked, linear
from nl_jax.memory import rule as rules


class State(NamedTuple):
  """Fast weights of a layer.

  Attributes:
    local: W; its segment is 2 id + 1 in every other span, else 2 id.
    wide: V.
    keys: the sum of k^T k over the span, w [B, H, K, K].
    place: int32 [B], tokens since a span began, counted over two spans.
  """

  local: chunked.MemoryState
  wide: chunked.MemoryState
  keys: chunked.MemoryState
  place: jax.Array


def wide_rule(rule: rules.Rule, span: int) -> rules.Rule:
  """How V learns: by plain gradients, and all of a chunk read its start."""
  return dataclasses.replace(
    rule, chunk=span, read="chunk_start", momentum="off", dgd_scope="none",
    remat_group=1,
  )  # fmt: skip


def keys_rule(rule: rules.Rule) -> rules.Rule:
  """How keys are added up."""
  return rules.Rule(
    chunk=rule.chunk, objective="dot", dgd_scope="none",
    retention_target="zero", erase_of="whole", remat_group=rule.remat_group,
  )  # fmt: skip


def start(
  params: dict[str, dict[str, jax.Array]],
  batch: int,
  key_dim: int,
  rule: rules.Rule,
  span: int,
) -> State:
  """Fast weights at the start of a sequence.

  Args:
    params: the learned starts "local" and "wide", dicts of [H, a, b].
    batch: B.
    key_dim: K.
    rule: how W learns.
    span: S.
  """
  like = jax.tree.leaves(params["local"])[0]
  keys = {"w": jnp.zeros((like.shape[0], key_dim, key_dim), like.dtype)}
  local = chunked.start(params["local"], batch, rule)
  return State(
    local,
    chunked.start(params["wide"], batch, wide_rule(rule, span)),
    chunked.start(keys, batch, keys_rule(rule)),
    local.phase,
  )


def update(
  forward: rules.Forward,
  params: dict[str, dict[str, jax.Array]],
  state: State,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: rules.Gates,
  *,
  rule: rules.Rule,
  span: int,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  run: chunked.Run | None = None,
  name: str = "memory",
) -> tuple[jax.Array, State, rules.Metrics]:
  """Writes T tokens into both memories and reads them at each.

  Args:
    forward: the architecture of both.
    params: of `start`.
    state: where the sequences stand.
    q, k, v, gates: as `chunked.update`; keys of unit norm.
    rule: how W learns.
    span: S, a multiple of its chunk.
    segment_ids, at_edge, aligned, run, name: as `chunked.walk`; `aligned`: of
      documents at multiples of S.

  Returns:
    (reads [B, T, H, V], state, metrics of W).
  """
  B, T, H = q.shape[:3]
  run = run or chunked.Run()
  ids = segment_ids
  if ids is None:
    ids = jnp.maximum(state.wide.segment, 1)[:, None]
    ids = jnp.broadcast_to(ids, (B, T))
  clock = state.wide._replace(phase=state.place)
  places = chunked.places(clock, segment_ids, T, 2 * span)
  own = jnp.where(ids == 0, 0, 2 * ids + places // span).astype(jnp.int32)
  how: Any = dict(at_edge=at_edge, aligned=aligned)
  # Deviation: a chunk of V moves it as far as a chunk of W, because the sum of
  # S gradients of one point diverges at the rates of W.
  slower = gates._replace(eta=gates.eta * (rule.chunk / span), log_beta=None)
  wide, V, _ = chunked.update(
    forward, params["wide"], state.wide, q, k, v, slower,
    rule=wide_rule(rule, span), segment_ids=segment_ids, run=run,
    name=f"{name}_wide", **how,
  )  # fmt: skip
  xs, begin, apart = (own, q, k, v, gates), (state.local, state.keys), None
  if at_edge and aligned and T % span == 0:
    apart = T // span
    fold = lambda x: x.reshape(B * apart, span, *x.shape[2:])
    anew = lambda x: jnp.repeat(x, apart, axis=0)
    xs, begin = jax.tree.map(fold, xs), jax.tree.map(anew, begin)
    run = run._replace(spec=_folded(run.spec))
  own, q, k, v, gates = xs
  still = jnp.zeros(q.shape[:3], gates.log_alpha.dtype)
  asked, keys, _ = linear.update(
    None, begin[1], q, k, k, rules.Gates(jnp.ones_like(still), still),
    rule=keys_rule(rule), segment_ids=own, chunk_free=True, run=run, **how,
  )  # fmt: skip
  near, local, metrics = chunked.update(
    forward, params["local"], begin[0], asked, k, v, gates,
    rule=rule, segment_ids=own, run=run, name=name, **how,
  )  # fmt: skip
  if apart is not None:
    near = near.reshape(B, T, H, -1)
    local, keys = _last(own.reshape(B, apart, span), (local, keys))
    add = lambda x: x.reshape(B, apart, *x.shape[1:]).sum(axis=1)
    metrics = jax.tree.map(add, metrics)
  place = _after(ids, places, state.place, 2 * span)
  return near + wide, State(local, V, keys, place), metrics


def _folded(spec: P | None) -> P | None:
  """Spans as rows: those of a row lie where its tokens did."""
  if spec is None:
    return None
  rows, along, heads = (*spec, None, None)[:3]
  several = lambda a: () if a is None else (a,) if isinstance(a, str) else a
  return P((*several(rows), *several(along)), None, heads)


def _last(own: jax.Array, states: Any) -> Any:
  """Of states [B n, ...] of spans, that of the last one with a token."""
  real = (own != 0).any(axis=2)
  B, n = real.shape
  last = n - 1 - jnp.argmax(real[:, ::-1], axis=1)
  rows = jnp.arange(B)
  return jax.tree.map(
    lambda x: x.reshape(B, n, *x.shape[1:])[rows, last], states
  )


def _after(
  ids: jax.Array, places: jax.Array, before: jax.Array, period: int
) -> jax.Array:
  """int32 [B], the place of the token after the call's last real one."""
  real = ids != 0
  last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
  place = jnp.take_along_axis(places, last[:, None], axis=1)[:, 0]
  place = (place + 1) % period
  return jnp.where(real.any(axis=1), place, before).astype(jnp.int32)
