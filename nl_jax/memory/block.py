"""A memory at the start of a chunk: its pairs, its reads and its sums.

With the anchor's weights and a tap on every pre-activation, the architecture
`forward(layer, z)` gives the pairs (u, delta) whose outer products are the
inner gradients (docs/mathematics.md 2.2).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels import walk
from nl_jax.memory import rule as rules


class Block(NamedTuple):
  """A memory at the start of a chunk, and what the chunk's tokens may see.

  Leading axes are those of a chunk function: [B, H], or the heads of a kernel.

  Attributes:
    start: dict of [..., a, b], the learned start; None: memories start empty.
    w: dict of [..., a, b], the deviations from the start now.
    s: their momentum; an empty dict without.
    carried: what a window or inner Muon has from before; else empty.
    at: the chunk's tokens, see `kernels.walk.At`.
  """

  start: rules.Weights | None
  w: rules.Weights
  s: rules.Weights
  carried: rules.Weights
  at: walk.At

  def begin(self, name: str) -> jax.Array:
    """The learned start of a layer, [..., a, b]."""
    return (
      jnp.zeros_like(self.w[name]) if self.start is None else (self.start[name])
    )

  def absolute(self, name: str, deviation: jax.Array) -> jax.Array:
    """The weights of a layer from their deviation."""
    return deviation if self.start is None else self.start[name] + deviation

  def at_anchor(self, name: str, x: jax.Array) -> jax.Array:
    """x [..., C, a] through the anchor of each token's own document."""
    at, kind = self.at, "anchor"
    deviation = self.w if at.anchor is None else at.anchor
    y = at.tile.mm(x, self.absolute(name, deviation[name]), "nn", kind)
    if at.ids is None:
      return y
    own = jnp.swapaxes(at.ids, -1, -2) == 0
    if self.start is None:
      return jnp.where(own, y, 0.0)
    return jnp.where(own, y, at.tile.mm(x, self.start[name], "nn", kind))


def pairs(
  forward: rules.Forward,
  block: Block,
  k: jax.Array,
  target: jax.Array,
  rule: rules.Rule,
) -> tuple[rules.Weights, rules.Weights, jax.Array]:
  """Layer inputs and errors of every token, at the anchor.

  Args:
    forward: the memory's architecture.
    block: see `Block`.
    k: keys [..., C, K]; target: [..., C, V], constant for the inner gradient
      (the outer one goes through it).
    rule: the objective, its clip and mean.

  Returns:
    (u, delta, terms): dicts of [..., C, a] and [..., C, b] whose outer products
    are the gradients of each token's loss, and terms [..., C, V] that add up
    to that loss.
  """

  def tapped(taps: rules.Weights) -> tuple[jax.Array, rules.Weights]:
    inputs = {}

    def layer(name: str, x: jax.Array) -> jax.Array:
      inputs[name] = block.at.tile.rounded(x)
      return block.at_anchor(name, inputs[name]) + taps[name]

    y = forward(layer, k)
    return y, inputs

  def zeros(W: jax.Array) -> jax.Array:
    lead = jnp.broadcast_shapes(k.shape[:-2], W.shape[:-2])
    return jnp.zeros((*lead, k.shape[-2], W.shape[-1]), W.dtype)

  taps = jax.tree.map(zeros, dict(block.w))
  prediction, pull, inputs = jax.vjp(tapped, taps, has_aux=True)
  error, terms = rules.output_error(rule, prediction, target)
  return inputs, pull(error)[0], terms


def _sum(x: jax.Array) -> jax.Array:
  """Over the last two axes, [..., 1, 1]; a TPU adds rows much faster."""
  rows = jnp.sum(x, axis=-2, keepdims=True)
  return jnp.sum(rows, axis=-1, keepdims=True)


def norm(weights: Iterable[jax.Array]) -> jax.Array:
  """Frobenius norm over all weights of a head, [..., 1, 1]."""
  total: Any = 0.0
  for W in weights:
    total = total + _sum(jnp.square(W))
  return jnp.sqrt(total)


def total(at: walk.At, x: jax.Array) -> jax.Array:
  """Over real tokens and the last axis: [..., C, n] to [..., 1, 1]."""
  return _sum(x * at.real)


def metric_sums(
  at: walk.At,
  gates: rules.Gates,
  loss: jax.Array,
  steps: jax.Array,
  size: jax.Array,
) -> jax.Array:
  """The sums of `Metrics`, [..., 1, 7]; gates of a channel are averaged.

  Args:
    at: the chunk.
    gates: columns [..., C, 1], or [..., C, K].
    loss, steps: [..., 1, 1], over the chunk.
    size: [..., 1, 1], the norm of the weights after it.
  """
  mean = lambda x: total(at, x) / x.shape[-1]
  count = mean(jnp.ones_like(at.real))
  beta = 0 * count
  if gates.log_beta is not None:
    beta = mean(jnp.exp(gates.log_beta))
  alpha = mean(jnp.exp(gates.log_alpha))
  sums = loss, steps, size * count, mean(gates.eta), alpha, beta, count
  return jnp.concatenate(sums, axis=-1)


def metrics(sums: jax.Array) -> rules.Metrics:
  """From the sums of a walk, [B, H, 7]."""
  sums = jax.lax.stop_gradient(sums).astype(jnp.float32)
  return rules.Metrics(
    *(sums[..., i] for i in range(len(rules.Metrics._fields)))
  )


def read(
  forward: rules.Forward,
  params: rules.Weights | None,
  w: rules.Weights,
  z: jax.Array,
) -> jax.Array:
  """Reads z [B, T, H, K] through a start and deviations [B, H, a, b]."""
  wide = jax.tree.leaves(w)[0].dtype
  weights = w
  if params is not None:
    weights = jax.tree.map(lambda r, d: r[None].astype(wide) + d, params, w)
  z = jnp.moveaxis(z.astype(wide), 1, 2)
  return jnp.moveaxis(forward(lambda name, x: x @ weights[name], z), 2, 1)
