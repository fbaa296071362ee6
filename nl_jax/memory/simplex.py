"""A memory whose weights stay on a simplex (Memora; Miras, arXiv 2504.13173).

    W = softmax(A);   A <- log softmax(alpha A - eta u^T delta)

The state is the deviation of A from that of the learned start, so a document
begins at 0. Pairs (u, delta) are those of W at the anchor; gates are one for
each key channel, which lies along the rows of a layer that is fed with the key
and along the columns of one that gives the value.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nl_jax.kernels import simplex as kernels
from nl_jax.kernels import walk as walks
from nl_jax.memory import block as blocks
from nl_jax.memory import chunked
from nl_jax.memory import rule as rules

_FORMS = (None, "xla", "reference")


class _Block(blocks.Block):
  """A block of logarithms, its start too; columns of weights sum to 1."""

  __slots__ = ()

  def logs_at_anchor(self, name: str) -> jax.Array:
    """The logarithms of a layer at the last chunk edge, [..., a, b]."""
    edge = self.w if self.at.anchor is None else self.at.anchor
    return self.absolute(name, edge[name])

  def at_anchor(self, name: str, x: jax.Array) -> jax.Array:
    """x [..., C, a] through the anchor of each token's own document."""
    at = self.at

    def through(logs: jax.Array) -> jax.Array:
      return at.tile.mm(x, jax.nn.softmax(logs, axis=-2), "nn", "anchor")

    y = through(self.logs_at_anchor(name))
    if at.ids is None:
      return y
    own = jnp.swapaxes(at.ids, -1, -2) == 0
    return jnp.where(own, y, through(self.begin(name)))


def _write_and_read(
  forward: rules.Forward,
  block: _Block,
  rule: rules.Rule,
  x: dict,
  lag: bool,
  implementation: str | None,
) -> tuple[jax.Array, rules.Weights, jax.Array]:
  """Reads [..., C, V], the deviations after a chunk, and `Metrics` sums."""
  at, ends, gates = block.at, {}, x["gates"]
  inputs, errors, terms = blocks.pairs(forward, block, x["k"], x["v"], rule)
  ids = None if at.ids is None else at.ids[..., 0, :].astype(jnp.int32) + 1

  def layer(name: str, z: jax.Array) -> jax.Array:
    u = inputs[name]
    own = rules.layer_gates(gates, name)
    y: Any
    y, ends[name] = kernels.simplex(
      u, errors[name], z, rules.rates(rule, own, u, at.real, erases=False),
      block.absolute(name, block.w[name]), lag=at.first > 0 if lag else None,
      read=rule.read, anchor=block.logs_at_anchor(name),
      start=block.begin(name), segment_ids=ids, implementation=implementation,
    )  # fmt: skip
    return y

  reads = forward(layer, x["q"])
  size = blocks.norm(ends.values())
  w = {name: ends[name] - block.begin(name) for name in block.w}
  loss = blocks.total(at, terms)
  sums = blocks.metric_sums(at, gates, loss, 0 * loss, size)
  return reads, w, sums


@jax.named_scope("memory")
def update(
  forward: rules.Forward,
  params: rules.Weights,
  state: chunked.MemoryState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: rules.Gates,
  *,
  rule: rules.Rule,
  lag: bool,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  run: chunked.Run | None = None,
  name: str = "",
) -> tuple[jax.Array, chunked.MemoryState, rules.Metrics]:
  """Writes T tokens into a memory and reads it at each; by XLA.

  Args:
    forward: the memory's architecture, see `rule`.
    params: logarithms of the learned start, dict of [H, a, b].
    state: where the sequences stand, deviations of logarithms.
    q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V].
    gates: eta and log alpha, [B, T, H, K].
    rule: the objective, its clip and mean; what a token reads; the chunk.
    lag: columns are made to sum to 1 at the first token of a chunk alone, and
      the chunk runs at once; else at every token, one after the other.
    segment_ids, at_edge, aligned: as `chunked.walk`.
    run: as `chunked.update`; there is no kernel.
    name: of a kernel, without use.

  Returns:
    (reads [B, T, H, V], state, metrics).

  Raises:
    ValueError: a kernel was named.
  """
  del name
  named = None if run is None else run.implementation
  if named not in _FORMS:
    raise ValueError(
      f"weights on a simplex cannot run as {named}: every state of a chunk is "
      "formed, which no kernel does; 'xla' takes it"
    )
  B, T, H = q.shape[:3]
  wide = jax.tree.leaves(state.w)[0].dtype
  start = jax.tree.map(lambda x: x.astype(wide), dict(params))

  def body(start: rules.Weights, now: walks.State, x: dict, at: walks.At):
    if rule.stop_grad_writes:
      now = jax.lax.stop_gradient(now)
    s, carried = now.s
    block = _Block(start, now.w, s, carried, at)
    by_token = "reference" if named == "reference" else None
    reads, w, sums = _write_and_read(forward, block, rule, x, lag, by_token)
    return walks.State(w, now.s), reads, sums

  y, state, sums = chunked.walk(
    body, state, start, {"q": q, "k": k, "v": v, "gates": gates},
    chunk=rule.chunk, group=rule.remat_group, segment_ids=segment_ids,
    at_edge=at_edge, aligned=aligned, name="simplex",
    run=chunked.Run("xla", None if run is None else run.spec),
  )  # fmt: skip
  return y.reshape(B, T, H, -1), state, blocks.metrics(sums)
