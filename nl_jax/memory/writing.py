"""What one chunk of tokens writes into a memory (docs/mathematics.md 2.3).

The pairs of `block` go through the exact per-token weights of `rank_one`,
which give the reads, and the memory after the chunk.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels import rank_one
from nl_jax.memory import block as blocks
from nl_jax.memory import muon, window
from nl_jax.memory import rule as rules


class _Write(NamedTuple):
  """What one layer learns from a chunk, and how.

  Attributes:
    u, delta: [..., C, ·]; rates: see `rank_one.Rates`.
    W: [..., a, b], the weights now; S: momentum or None.
    R: what retention goes to, the start or None; begin: the start.
    window: of `rank_one`.
  """

  u: jax.Array
  delta: jax.Array
  rates: rank_one.Rates
  W: jax.Array
  S: jax.Array | None
  R: jax.Array | None
  begin: jax.Array
  window: tuple[jax.Array, jax.Array, jax.Array] | None


_Read = Callable[[str, jax.Array], jax.Array]
_End = Callable[[str], tuple[jax.Array, jax.Array | None]]


def _by_chunk(
  layers: Mapping[str, _Write], block: blocks.Block, rule: rules.Rule
) -> tuple[_Read, _End]:
  """Reads of layers, and their weights and momentum after the chunk."""
  at, made = block.at, {}
  first = next(iter(layers.values())).rates
  tokens = rank_one.Tokens(
    first.log_alpha, first.log_beta, at.real, ids=at.ids, tile=at.tile
  )
  for name, x in layers.items():
    D, fresh = block.w[name], None
    if x.R is None and block.start is not None:
      D, fresh = x.W, x.begin  # What decays to 0 is W, and begins at the start.
    made[name] = rank_one.Chunk(
      tokens, x.u, x.delta, x.rates.write, x.rates.erase, D, x.S, x.R,
      fresh=fresh, window=x.window,
    )  # fmt: skip
  solved = rank_one.recall(list(made.values()), rule.erase_of)
  rows = dict(zip(made, solved))

  def end(name: str) -> tuple[jax.Array, jax.Array | None]:
    D, S = made[name].end(rows[name])
    start = block.start
    if layers[name].R is None and start is not None:
      D = D - start[name]
    return D, S

  return lambda name, x: made[name].read(x, rule.read, rows[name]), end


def _by_token(
  layers: Mapping[str, _Write],
  block: blocks.Block,
  rule: rules.Rule,
  eta: jax.Array,
) -> tuple[_Read, _End]:
  """`_by_chunk` by the token loop, the definition."""
  at = block.at
  ends: dict[str, Any] = {}
  ids = None if at.ids is None else at.ids[..., 0, :].astype(jnp.int32) + 1

  def run(name: str, x: jax.Array | None) -> Any:
    own = layers[name]
    call: Callable[..., Any] = functools.partial(
      rank_one.rank_one, window=own.window, implementation="reference",
      read=rule.read, erase_of=rule.erase_of,
    )  # fmt: skip
    if rule.inner_muon == "token":
      call = functools.partial(muon.by_token, eta=eta, read=rule.read)
    anchor = block.w if at.anchor is None else at.anchor
    y, *ends[name] = call(
      own.u, own.delta, x, own.rates, own.W, own.S, own.R,
      anchor=block.absolute(name, anchor[name]), start=own.begin,
      segment_ids=ids,
    )  # fmt: skip
    return y

  def end(name: str) -> tuple[jax.Array, jax.Array | None]:
    if name not in ends:
      run(name, None)
    W, S = ends[name]
    return W if block.start is None else W - block.start[name], S

  return run, end


def write_and_read(
  forward: rules.Forward,
  block: blocks.Block,
  rule: rules.Rule,
  q: jax.Array | None,
  k: jax.Array,
  target: jax.Array,
  gates: rules.Gates,
  *,
  by_token: bool = False,
  factor: jax.Array | None = None,
) -> tuple[jax.Array | None, blocks.Block, jax.Array]:
  """Writes a chunk's tokens into a memory; reads it along the way (eq. 88).

  Args:
    forward, block, rule: see their types.
    q: [..., C, K], or None to write only.
    k, target: [..., C, K], [..., C, V].
    gates: columns [..., C, 1]; [..., C, K] for gates of a channel.
    by_token: one token at a time, the definition, in place of the chunk form.
    factor: [..., C, 1], what a token sees of the changes since the anchor
      (TTT); None is 1.

  Returns:
    (reads [..., C, V] or None, the block after the chunk, sums [..., 1, 7]),
    the sums those of `Metrics`.
  """
  at, before, view = block.at, 0, block
  laid: window.Window | None = None
  _, eta = at.tile.keys(k, gates.eta)
  if rule.omega > 1:
    assert gates.gamma is not None  # Gates of a rule with a window have it.
    laid = window.extend(block, k, target, gates.gamma, rule.omega)
    before, view = rule.omega - 1, window.widened(block, rule.omega)
    k, target = laid.k, laid.target
  all_u, all_delta, terms = blocks.pairs(forward, view, k, target, rule)
  own = lambda x: x[..., before:, :] if before else x
  layers, momenta = {}, {}
  steps: Any = 0.0
  for name, D in block.w.items():
    u, delta = own(all_u[name]), own(all_delta[name])
    gate = rules.layer_gates(gates._replace(eta=eta), name)
    rate = rules.rates(rule, gate, u, at.real, rules.erases(rule, name))
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None
    if laid is not None:
      keys = all_u[name][..., :before, :]
      past = keys, all_delta[name][..., :before, :], laid.weights
    W, S = block.absolute(name, D), block.s.get(name)
    R = block.begin(name) if rule.retention_target == "init" else None
    if rule.inner_muon == "chunk":
      assert S is not None  # Inner Muon has momentum.
      momenta[name] = muon.momentum(u, delta, rate, S, past, at)
      rate = rate._replace(log_beta=None, write=0 * rate.write)
      S = past = None
    layers[name] = _Write(u, delta, rate, W, S, R, block.begin(name), past)
    if gate.eta.ndim == u.ndim:
      size = _write_sizes(all_u[name], all_delta[name], laid)
      steps = steps + jnp.square(layers[name].rates.write) * size
  if by_token or rule.loops:
    read, end = _by_token(layers, block, rule, gates.eta)
  else:
    read, end = _by_chunk(layers, block, rule)

  def layer(name: str, x: jax.Array) -> jax.Array:
    if rule.read == "chunk_start":
      return block.at_anchor(name, x)
    if factor is None:
      return read(name, x)
    still = block.at_anchor(name, x)
    return still + factor * (read(name, x) - still)

  reads = None if q is None else forward(layer, q)
  ends = {name: end(name) for name in layers}
  w = {name: D for name, (D, _) in ends.items()}
  s = {name: S for name, (_, S) in ends.items() if S is not None} or momenta
  carried = dict(block.carried) | ({} if laid is None else laid.past)
  after = block._replace(w=w, s=s, carried=carried)
  if rule.inner_muon == "chunk":
    after = muon.move(after, gates.eta)
  size = blocks.norm(after.absolute(name, D) for name, D in after.w.items())
  steps = jnp.sqrt(steps + jnp.zeros_like(at.real))
  sums = blocks.total(at, own(terms)), blocks.total(at, steps), size
  return reads, after, blocks.metric_sums(at, gates, *sums)


def _write_sizes(
  u: jax.Array, delta: jax.Array, laid: window.Window | None
) -> jax.Array:
  """Squared norm of what each token writes, [..., C, 1], but for its rate."""
  if laid is not None:
    return window.squared_norms(u, delta, laid.weights)
  square = lambda x: jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return square(u) * square(delta)
