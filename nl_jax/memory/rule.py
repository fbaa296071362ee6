"""How a memory learns: its switches and rates (docs/mathematics.md 2.2, 2.3).

A memory is a function `forward(layer, z)` of its layers, where
`layer(name, x)` stands for `x @ W[name]`. Everything else follows from it:
`block` has its inner gradients, `writing` its writes and reads.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from nl_jax import fields
from nl_jax.fields import OneOf, Whole
from nl_jax.kernels import rank_one, walk
from nl_jax.memory import objectives

Layer = Callable[[str, jax.Array], jax.Array]
Forward = Callable[[Layer, jax.Array], jax.Array]
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
  inner_muon: Annotated[str, OneOf("off", "chunk", "token")] = "off"

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
