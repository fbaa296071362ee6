"""What a memory learns from one block of tokens (model.md 2.2, 2.3).

A memory is a function `forward(apply, z)` of its layers, where
`apply(name, x)` stands for `x @ W[name]`. Everything else follows from it:
with the anchor's weights and a tap on every pre-activation it gives the pairs
(u, delta) whose outer products are the inner gradients; with the exact
per-token weights of `rank_one` it gives the reads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels import rank_one
from nl_jax.memory import muon, objectives, window

Apply = Callable[[str, jax.Array], jax.Array]
Forward = Callable[[Apply, jax.Array], jax.Array]
Weights = Mapping[str, jax.Array]

INPUT_LAYERS = ("w", "w_in", "w_gate")  # Layers whose input is the key.

_CHOICES = {
  "objective": tuple(objectives.OBJECTIVES),
  "dgd_scope": ("per_layer", "input_layer", "none"),
  "dgd_coef": ("prox", "raw", "decayed"),
  "momentum": ("off", "ema", "sum"),
  "retention_target": ("init", "zero"),
  "erase_of": rank_one.api.ERASES,
  "read": rank_one.api.READS,
  "inner_muon": muon.MODES,
}


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a memory learns: the switches of model.md 2.2-2.4.

  Attributes:
    chunk: tokens that share one gradient point; part of the function.
    objective: inner loss, a key of `objectives.OBJECTIVES`.
    dgd_scope: layers that also erase (delta gradient descent, eq. 56):
      "per_layer", "input_layer" (those fed with the key), "none" (plain GD).
    dgd_coef: "prox", eta / (1 + eta |u|^2), "raw", eta (literal eq. 88), or
      "decayed", which erases alpha eta: from the memory as it has decayed, the
      gated delta rule alpha (I - eta k^T k).
    momentum: "off", "ema" or "sum" (literal Titans).
    retention_target: "init" decays to the learned start, "zero" to 0.
    erase_of: "deviation" from the retention target, or the "whole" memory.
    read: "after" the token's own write, "before" it, or at "chunk_start".
    residual_clip: largest norm of an output error; 0 = off.
    inner_mean: divide the output error by V.
    remat_group: chunks whose intermediates are recomputed together.
    stop_grad_writes: the outer gradient does not pass earlier chunks' writes.
    omega: tokens whose gradients one token writes, each times its gate gamma
      (Atlas, see `window`); 1: its own, without gate.
    inner_muon: "off"; "chunk", the memory moves at the end of a chunk by its
      momentum made orthogonal; "token", at every token (Atlas, see `muon`).
  """

  chunk: int = 16
  objective: str = "l2"
  dgd_scope: str = "per_layer"
  dgd_coef: str = "prox"
  momentum: str = "off"
  retention_target: str = "init"
  erase_of: str = "deviation"
  read: str = "after"
  residual_clip: float = 0.0
  inner_mean: bool = False
  remat_group: int = 4
  stop_grad_writes: bool = False
  omega: int = 1
  inner_muon: str = "off"

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"memory.{name} must be one of {', '.join(allowed)}; got "
          f"{getattr(self, name)!r}"
        )
    for name in ("chunk", "remat_group", "omega"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"memory.{name} must be at least 1, got {getattr(self, name)}"
        )
    if self.inner_muon != "off":
      self._check_muon()

  def _check_muon(self) -> None:
    if not self.has_momentum:
      raise ValueError(
        f"memory.inner_muon={self.inner_muon!r} makes momentum orthogonal: set "
        "memory.momentum to 'ema' or 'sum', got 'off'"
      )
    if self.dgd_scope != "none":
      raise ValueError(
        f"memory.inner_muon={self.inner_muon!r} erases nothing: set memory."
        f"dgd_scope to 'none', got {self.dgd_scope!r}"
      )

  @property
  def has_momentum(self) -> bool:
    """Whether the memory keeps S beside W."""
    return self.momentum != "off"

  @property
  def simplex(self) -> bool:
    """Whether fast weights are logarithms of columns that sum to 1 (Memora)."""
    return False

  @property
  def lags(self) -> bool:
    """Whether they are made so only at the first token of a chunk."""
    return False

  @property
  def loops(self) -> bool:
    """Whether there is no chunk form: token by token, by the reference."""
    return (self.simplex and not self.lags) or self.inner_muon == "token"


class Gates(NamedTuple):
  """Raw gates of each token, [B, T, H] (reference only: [B, T, H, K]).

  Attributes:
    eta: inner learning rate, >= 0.
    log_alpha: log of the retention, <= 0.
    log_beta: log of the momentum decay, <= 0; None without momentum.
    gamma: of a token's gradient in the writes of the next omega - 1 tokens and
      its own, 0 to 1; None without window.
  """

  eta: jax.Array
  log_alpha: jax.Array
  log_beta: jax.Array | None = None
  gamma: jax.Array | None = None


class Metrics(NamedTuple):
  """Sums over the real tokens of a call, float32 [B, H]; divide by `count`.

  Attributes:
    inner_loss: the objective at the anchor, before the token's write.
    update_norm: Frobenius norm of the token's write over all layers.
    memory_norm: Frobenius norm of the fast weights.
    eta, alpha, beta: the gates (beta 0 without momentum).
    count: real tokens.
  """

  inner_loss: jax.Array
  update_norm: jax.Array
  memory_norm: jax.Array
  eta: jax.Array
  alpha: jax.Array
  beta: jax.Array
  count: jax.Array


class Block(NamedTuple):
  """A memory at the start of a block, and what the block's tokens may see.

  Attributes:
    anchor, w: dicts of [B, H, a, b]: the gradient point and the current
      weights. s: momentum, and with a window what `window` carries; a dict
      that is empty without both.
    start: dict of [B, H, a, b], the learned start.
    mask: bool [B, 1, C], real tokens.
    segment_ids: int32 [B, 1, C] where documents may begin inside the block.
    carried: bool [B, 1, C, 1], tokens of the document that the block begins
      in, with `segment_ids`; else None.
    row: [B, H or 1, C], factor on what is read of the open chunk's changes
      (see `rank_one`), or None.
    first: bool [B or 1, 1], the block begins with the first place of a chunk.
  """

  anchor: Weights
  w: Weights
  s: Weights
  start: Weights
  mask: jax.Array
  segment_ids: jax.Array | None = None
  carried: jax.Array | None = None
  row: jax.Array | None = None
  first: jax.Array | None = None

  def at_anchor(self, name: str, x: jax.Array) -> jax.Array:
    """x [B, H, C, a] through the anchor of each token's own document."""
    y = x @ self.anchor[name]
    if self.carried is None:
      return y
    return jnp.where(self.carried, y, x @ self.start[name])


def pairs(
  forward: Forward,
  block: Block,
  k: jax.Array,
  target: jax.Array,
  rule: Rule,
) -> tuple[Weights, Weights, jax.Array]:
  """Layer inputs and errors of every token, at the anchor.

  Args:
    forward: the memory's architecture.
    block: see `Block`.
    k: keys [B, H, C, K]; target: [B, H, C, V], constant for the inner
      gradient (the outer one goes through it).
    rule: the objective, its clip and mean.

  Returns:
    (u, delta, loss): dicts of [B, H, C, a] and [B, H, C, b] whose outer
    products are the gradients of each token's loss, and that loss [B, H, C].
  """

  def tapped(taps: Weights) -> tuple[jax.Array, Weights]:
    inputs = {}

    def apply(name: str, x: jax.Array) -> jax.Array:
      inputs[name] = x
      return block.at_anchor(name, x) + taps[name]

    y = forward(apply, k)
    return y, inputs

  def zeros(W: jax.Array) -> jax.Array:
    lead = jnp.broadcast_shapes(k.shape[:-2], W.shape[:-2])
    return jnp.zeros((*lead, k.shape[-2], W.shape[-1]), W.dtype)

  taps = jax.tree.map(zeros, block.anchor)
  prediction, pull, inputs = jax.vjp(tapped, taps, has_aux=True)
  objective = objectives.OBJECTIVES[rule.objective]
  error = objective.error(prediction, target)
  if rule.inner_mean:
    error = error / error.shape[-1]
  if rule.residual_clip:
    error = objectives.clip_norm(error, rule.residual_clip)
  return inputs, pull(error)[0], objective.loss(prediction, target)


def coefficients(
  rule: Rule, gates: Gates, u: jax.Array, erases: bool
) -> tuple[jax.Array, jax.Array | None]:
  """Write and erase rates of one layer with inputs u [B, H, C, a]."""
  rate = gates.eta
  if erases and rule.dgd_coef == "prox":
    size = jnp.sum(jnp.square(u), axis=-1)
    if rate.ndim > size.ndim:
      size = size[..., None, None]
    rate = rate / (1.0 + rate * size)
  write = rate
  if rule.momentum == "ema":
    kept = gates.log_beta
    kept = kept[..., None, None] if rate.ndim > kept.ndim else kept
    write = rate * -jnp.expm1(kept)
  if rule.dgd_coef == "decayed":
    rate = rate * jnp.exp(gates.log_alpha)
  return write, rate if erases else None


def _layer_gates(gates: Gates, W: jax.Array) -> Gates:
  """Gates of one layer; those of a channel lie along its K-wide axis."""
  if gates.eta.ndim < W.ndim:
    return gates
  axis = -1 if W.shape[-2] == gates.eta.shape[-1] else -2
  return gates._replace(
    eta=jnp.expand_dims(gates.eta, axis),
    log_alpha=jnp.expand_dims(gates.log_alpha, axis),
  )


def write_and_read(
  forward: Forward,
  block: Block,
  rule: Rule,
  q: jax.Array | None,
  k: jax.Array,
  target: jax.Array,
  gates: Gates,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array | None, Weights, Weights, Metrics]:
  """Writes a block's tokens into a memory; reads it along the way.

  Args:
    forward, block, rule: see their types.
    q: [B, H, C, K], or None to write only.
    k, target: [B, H, C, K], [B, H, C, V].
    gates: each [B, H, C]; [B, H, C, K] for gates of a channel.
    implementation: of `rank_one`.

  Returns:
    (reads [B, H, C, V] or None, w, s, metrics).
  """
  laid, before, view = None, 0, block
  if rule.omega > 1:
    laid = window.extend(block, k, target, gates.gamma, rule.omega)
    before, view = rule.omega - 1, window.widened(block, rule.omega)
    k, target = laid.k, laid.target
  if rule.simplex:
    real = lambda W: jax.nn.softmax(W, axis=-2) if rule.lags else jnp.exp(W)
    anchor, start = jax.tree.map(real, (view.anchor, view.start))
    view = view._replace(anchor=anchor, start=start)
  all_u, all_delta, loss = pairs(forward, view, k, target, rule)
  own = lambda x: x[..., before:, :] if before else x
  u, delta = jax.tree.map(own, (all_u, all_delta))
  loss = loss[..., before:]
  w, squared_steps = {}, []
  s = {} if laid is None else dict(laid.past)
  if rule.inner_muon == "chunk":
    rate = block.s[muon.RATE]
    s[muon.RATE] = muon.last_rate(rate, gates.eta, block.mask)

  def layer(name: str, x: jax.Array | None) -> jax.Array | None:
    W = block.w[name]
    erases = rule.dgd_scope == "per_layer" or (
      rule.dgd_scope == "input_layer" and name in INPUT_LAYERS
    )
    own = _layer_gates(gates, W)
    write, erase = coefficients(rule, own, u[name], erases)
    past = None
    if laid is not None:
      ahead = (x[name][..., :before, :] for x in (all_u, all_delta))
      past = (*ahead, laid.weights)
    how = dict(
      read=rule.read,
      erase_of=rule.erase_of,
      segment_ids=block.segment_ids,
      implementation=implementation,
    )
    rates = (own.log_alpha, own.log_beta, write, erase, block.mask)
    S = block.s.get(name)
    if rule.inner_muon == "chunk":
      # S is a memory that decays by beta, beside one that nothing is written
      # to before the chunk ends.
      kept = (own.log_beta, None, write, None, block.mask)
      start = jnp.zeros_like(block.start[name])
      _, s[name], _ = rank_one.rank_one(
        u[name], delta[name], None, kept, S, None, None,
        start=start, window=past, **how,
      )  # fmt: skip
      rates = (own.log_alpha, None, jnp.zeros_like(write), None, block.mask)
      S = past = None
    reads, w[name], momentum = rank_one.rank_one(
      u[name],
      delta[name],
      x,
      rates,
      W,
      S,
      block.start[name] if rule.retention_target == "init" else None,
      anchor=block.anchor[name],
      start=block.start[name],
      row=block.row,
      window=past,
      simplex=rule.simplex,
      lag=block.first if rule.lags else None,
      orthogonal=(
        (own.eta, muon.orthogonal) if rule.inner_muon == "token" else None
      ),
      **how,
    )
    if momentum is not None:
      s[name] = momentum
    if write.ndim == gates.log_alpha.ndim:
      size = _write_sizes(all_u[name], all_delta[name], laid)
      squared_steps.append(jnp.square(write) * size)
    return reads

  if q is None:
    reads = None
    for name in block.w:
      layer(name, None)
  else:
    reads = forward(layer, q)
  steps = sum(squared_steps) if squared_steps else jnp.zeros_like(loss)
  return reads, w, s, _metrics(block, w, gates, loss, jnp.sqrt(steps))


def _write_sizes(
  u: jax.Array, delta: jax.Array, laid: window.Window | None
) -> jax.Array:
  """Squared norm of what each token writes, [B, H, C], but for its rate."""
  if laid is not None:
    return window.squared_norms(u, delta, laid.weights)
  square = lambda x: jnp.sum(jnp.square(x), axis=-1)
  return square(u) * square(delta)


def _metrics(
  block: Block,
  w: Weights,
  gates: Gates,
  loss: jax.Array,
  steps: jax.Array,
) -> Metrics:
  """Sums over the block's real tokens; roles, where there are, averaged."""
  loss, steps, gates, w = jax.lax.stop_gradient((loss, steps, gates, w))
  mask = block.mask

  def total(x: jax.Array) -> jax.Array:
    if x.ndim > loss.ndim:
      x = x.mean(axis=-1)
    x = jnp.sum(jnp.where(mask, x, 0.0), axis=-1).astype(jnp.float32)
    return x.mean(axis=tuple(range(2, x.ndim)))

  count = total(jnp.ones_like(loss))
  squares = [jnp.sum(jnp.square(W), axis=(-2, -1)) for W in w.values()]
  norm = jnp.sqrt(sum(squares)).astype(jnp.float32)
  norm = norm.mean(axis=tuple(range(2, norm.ndim)))
  beta = jnp.zeros_like(count)
  if gates.log_beta is not None:
    beta = total(jnp.exp(gates.log_beta))
  return Metrics(
    inner_loss=total(loss),
    update_norm=total(steps),
    memory_norm=norm * count,
    eta=total(gates.eta),
    alpha=total(jnp.exp(gates.log_alpha)),
    beta=beta,
    count=count,
  )


def read(forward: Forward, w: Weights, z: jax.Array) -> jax.Array:
  """Reads z [B, T, H, K] through weights w (dict of [B, H, a, b])."""
  z = jnp.moveaxis(z.astype(jax.tree.leaves(w)[0].dtype), 1, 2)
  return jnp.moveaxis(forward(lambda name, x: x @ w[name], z), 2, 1)
