"""What a memory learns from one block of tokens (docs/mathematics.md 2.2, 2.3).

A memory is a function `forward(apply, z)` of its layers, where
`apply(name, x)` stands for `x @ W[name]`. Everything else follows from it:
with the anchor's weights and a tap on every pre-activation it gives the pairs
(u, delta) whose outer products are the inner gradients; with the exact
per-token weights of `rank_one` it gives the reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from nl_jax import fields
from nl_jax.fields import OneOf, Whole
from nl_jax.kernels import rank_one, walk
from nl_jax.memory import muon, objectives, window

Apply = Callable[[str, jax.Array], jax.Array]
Forward = Callable[[Apply, jax.Array], jax.Array]
Weights = Mapping[str, jax.Array]

INPUT_LAYERS = ("w", "w_in", "w_gate")  # Layers whose input is the key.

# What fields of a rule may be, here and where other rules give them other
# defaults.
Objective = Annotated[str, OneOf(*objectives.OBJECTIVES)]
Scope = Annotated[str, OneOf("per_layer", "input_layer", "none")]
Coefficient = Annotated[str, OneOf("prox", "raw", "decayed")]
Momentum = Annotated[str, OneOf("off", "ema", "sum")]
Retention = Annotated[str, OneOf("init", "zero")]
Erase = Annotated[str, OneOf(*rank_one.ERASES)]
Read = Annotated[str, OneOf(*rank_one.READS)]
Clip = Annotated[float, fields.AT_LEAST_0]
Count = Annotated[int, Whole(1)]
Walk = Annotated[str, OneOf("auto", *walk.IMPLEMENTATIONS)]


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a memory learns: the switches of docs/mathematics.md 2.2-2.4.

  Attributes:
    chunk: tokens that share one gradient point; part of the function.
    objective: inner loss (eq. 92: dot, eq. 93: l2), see `memory.objectives`.
    dgd_scope: layers that also erase (delta gradient descent, eq. 56):
      "per_layer", "input_layer" (those fed with the key), "none" (plain GD).
    dgd_coef: "prox", eta / (1 + eta |u|^2), "raw", eta (literal eq. 88), or
      "decayed", which erases alpha eta: from the memory as it has decayed, the
      gated delta rule alpha (I - eta k^T k).
    momentum: "off", "ema" or "sum" (literal Titans).
    retention_target: "init" decays to the learned start, "zero" to 0.
    erase_of: "deviation" from the retention target, or the "whole" memory.
    read: "after" the token's own write, "before" it, or at "chunk_start".
    residual_clip: largest norm of an inner error; 0: off. Ours.
    inner_mean: inner errors are divided by the value width V.
    remat_group: chunks between states kept for the backward pass; 1 is fastest.
    stop_grad_writes: the outer gradient does not pass earlier chunks' writes.
    omega: tokens whose gradients one token writes, each times its gate gamma
      (Atlas, see `window`); 1: its own, without gate.
    inner_muon: "off"; "chunk", the memory moves at the end of a chunk by its
      momentum made orthogonal; "token", at every token (Atlas, see `muon`).
  """

  chunk: Count = 16
  objective: Objective = "l2"
  dgd_scope: Scope = "per_layer"
  dgd_coef: Coefficient = "prox"
  momentum: Momentum = "off"
  retention_target: Retention = "init"
  erase_of: Erase = "deviation"
  read: Read = "after"
  residual_clip: Clip = 0.0
  inner_mean: bool = False
  remat_group: Count = 4
  stop_grad_writes: bool = False
  omega: Count = 1
  inner_muon: Annotated[str, OneOf(*muon.MODES)] = "off"

  def __post_init__(self):
    fields.check("model.mixer", type(self), vars(self))
    if self.inner_muon != "off":
      self._check_muon()

  def _check_muon(self) -> None:
    if not self.has_momentum:
      raise ValueError(
        f"model.mixer.inner_muon={self.inner_muon!r} makes momentum "
        "orthogonal: set model.mixer.momentum to 'ema' or 'sum', got 'off'"
      )
    if self.dgd_scope != "none":
      raise ValueError(
        f"model.mixer.inner_muon={self.inner_muon!r} erases nothing: "
        f"set model.mixer.dgd_scope to 'none', got {self.dgd_scope!r}"
      )

  @property
  def has_momentum(self) -> bool:
    """Whether the memory keeps S beside W."""
    return self.momentum != "off"

  @property
  def affine(self) -> bool:
    """Whether a matrix changes column by column, each affine in itself."""
    plain = self.objective in ("dot", "l2") and self.omega == 1
    whole = self.residual_clip or self.inner_mean or self.inner_muon != "off"
    return plain and not whole and not self.stop_grad_writes

  @property
  def loops(self) -> bool:
    """Whether there is no chunk form: token by token, by the reference."""
    return self.inner_muon == "token"


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
  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.


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

  start: Weights | None
  w: Weights
  s: Weights
  carried: Weights
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
    k: keys [..., C, K]; target: [..., C, V], constant for the inner gradient
      (the outer one goes through it).
    rule: the objective, its clip and mean.

  Returns:
    (u, delta, terms): dicts of [..., C, a] and [..., C, b] whose outer products
    are the gradients of each token's loss, and terms [..., C, V] that add up
    to that loss.
  """

  def tapped(taps: Weights) -> tuple[jax.Array, Weights]:
    inputs = {}

    def apply(name: str, x: jax.Array) -> jax.Array:
      inputs[name] = block.at.tile.rounded(x)
      return block.at_anchor(name, inputs[name]) + taps[name]

    y = forward(apply, k)
    return y, inputs

  def zeros(W: jax.Array) -> jax.Array:
    lead = jnp.broadcast_shapes(k.shape[:-2], W.shape[:-2])
    return jnp.zeros((*lead, k.shape[-2], W.shape[-1]), W.dtype)

  taps = jax.tree.map(zeros, dict(block.w))
  prediction, pull, inputs = jax.vjp(tapped, taps, has_aux=True)
  error, terms = output_error(rule, prediction, target)
  return inputs, pull(error)[0], terms


def output_error(
  rule: Rule, prediction: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(error, terms of the loss), [..., C, V], of what a memory predicts."""
  objective = objectives.OBJECTIVES[rule.objective]
  error = objective.error(prediction, target)
  if rule.inner_mean:
    error = error / error.shape[-1]
  if rule.residual_clip:
    error = objectives.clip_norm(error, rule.residual_clip)
  return error, objective.terms(prediction, target)


def rates(
  rule: Rule, gates: Gates, u: jax.Array, mask: jax.Array, erases: bool
) -> rank_one.Rates:
  """The rates of one layer with inputs u [..., C, a], eq. 56 and 88.

  Args:
    rule: the switches.
    gates: columns [..., C, 1], or of a channel [..., C, a, 1].
    u: the layer's inputs.
    mask: [..., C, 1], 1 for real tokens.
    erases: whether the layer erases too.
  """
  rate = gates.eta
  if erases and rule.dgd_coef == "prox":
    size = jnp.sum(jnp.square(u), axis=-1, keepdims=True)
    if rate.ndim > size.ndim:
      size = size[..., None]
    rate = rate / (1.0 + rate * size)
  write, erase = rate, cast(Any, "write")
  if rule.momentum == "ema":
    kept = gates.log_beta
    assert kept is not None
    kept = kept[..., None] if rate.ndim > kept.ndim else kept
    write, erase = rate * (1.0 - jnp.exp(kept)), rate
  if rule.dgd_coef == "decayed":
    apart = rule.momentum == "ema"
    erase = rate * jnp.exp(gates.log_alpha) if apart else "decayed"
  return rank_one.Rates(
    gates.log_alpha, gates.log_beta, write, erase if erases else None, mask
  )


def layer_gates(gates: Gates, name: str) -> Gates:
  """Gates of one layer; those of a channel, [..., C, K], along its K channels.

  These are the inputs of a layer that is fed with the key, [..., C, K, 1], and
  the outputs of another, [..., C, 1, K].
  """
  if gates.eta.shape[-1] == 1:
    return gates
  axis = -1 if name in INPUT_LAYERS else -2
  wide = lambda x: jnp.expand_dims(x, axis)
  return gates._replace(eta=wide(gates.eta), log_alpha=wide(gates.log_alpha))


def erases(rule: Rule, name: str) -> bool:
  """Whether a layer erases what it recalls, beside writing."""
  inputs = rule.dgd_scope == "input_layer" and name in INPUT_LAYERS
  return rule.dgd_scope == "per_layer" or inputs


class _Layer(NamedTuple):
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
  layers: Mapping[str, _Layer], block: Block, rule: Rule
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
  layers: Mapping[str, _Layer], block: Block, rule: Rule, eta: jax.Array
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
  forward: Forward,
  block: Block,
  rule: Rule,
  q: jax.Array | None,
  k: jax.Array,
  target: jax.Array,
  gates: Gates,
  *,
  by_token: bool = False,
  factor: jax.Array | None = None,
) -> tuple[jax.Array | None, Block, jax.Array]:
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
  all_u, all_delta, terms = pairs(forward, view, k, target, rule)
  own = lambda x: x[..., before:, :] if before else x
  layers, momenta = {}, {}
  steps: Any = 0.0
  for name, D in block.w.items():
    u, delta = own(all_u[name]), own(all_delta[name])
    gate = layer_gates(gates._replace(eta=eta), name)
    rate = rates(rule, gate, u, at.real, erases(rule, name))
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
    layers[name] = _Layer(u, delta, rate, W, S, R, block.begin(name), past)
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
  size = norm(after.absolute(name, D) for name, D in after.w.items())
  steps = jnp.sqrt(steps + jnp.zeros_like(at.real))
  sums = total(at, own(terms)), total(at, steps), size
  return reads, after, metric_sums(at, gates, *sums)


def _write_sizes(
  u: jax.Array, delta: jax.Array, laid: window.Window | None
) -> jax.Array:
  """Squared norm of what each token writes, [..., C, 1], but for its rate."""
  if laid is not None:
    return window.squared_norms(u, delta, laid.weights)
  square = lambda x: jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return square(u) * square(delta)


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
  gates: Gates,
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


def metrics(sums: jax.Array) -> Metrics:
  """From the sums of a walk, [B, H, 7]."""
  sums = jax.lax.stop_gradient(sums).astype(jnp.float32)
  return Metrics(*(sums[..., i] for i in range(len(Metrics._fields))))


def read(
  forward: Forward, params: Weights | None, w: Weights, z: jax.Array
) -> jax.Array:
  """Reads z [B, T, H, K] through a start and deviations [B, H, a, b]."""
  wide = jax.tree.leaves(w)[0].dtype
  weights = w
  if params is not None:
    weights = jax.tree.map(lambda r, d: r[None].astype(wide) + d, params, w)
  z = jnp.moveaxis(z.astype(wide), 1, 2)
  return jnp.moveaxis(forward(lambda name, x: x @ weights[name], z), 2, 1)
