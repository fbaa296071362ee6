"""Titans (LMM): a deep memory that learns by momentum, as the whole mixer.

    q, k, v = SiLU(conv4(x W));  q, k to unit norm       (Titans sec. 4.4)
    alpha, beta = sigmoid(x w + b);  eta = eta_max sigmoid(x w + b)
    S <- beta S - (1 - beta) eta grad l(M; k, v);  M <- alpha M + S
    out = (RMSNorm_K(M(q)) * SiLU(x W_g)) W_o

Titans, arXiv 2501.00663, with its (eta, theta, 1 - alpha) our (beta, write
rate, alpha). It is the layer of HOPE without generators and with gates straight
from the input (docs/mathematics.md 3.2, 6). The authors state neither shapes
nor chunks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax

from nl_jax import fields, memory, types
from nl_jax.fields import OneOf, Whole
from nl_jax.levels import LevelRow
from nl_jax.memory import linear, mlp, rule
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract

PROJECTED = ("q", "k", "v")
LMM = "use model.arch='titans_lmm'"  # Of memories that have less.


@dataclasses.dataclass(frozen=True)
class Options(memory.Rule):
  """The switches of the long-term memory: its rule, and these.

  Attributes:
    memory: "linear", "mlp", "mlp_ln" or "glu".
    hidden: M, hidden units of an MLP memory; 0: the key width K.
    residual: the memory adds its input.
    value_norm: "none", or "l2": values of unit norm.
    span: S, tokens after which the memory is reset, beside a global one with
      chunks of S (TNT, see `memory.spans`); 0: one memory of all tokens.
    eta_max: largest inner learning rate of a token: eta = eta_max sigmoid(. +
      eta_bias).
    eta_bias: bias of the inner learning rate, see eta_max.
    alpha_bias: bias of the retention alpha = sigmoid(. + alpha_bias).
    beta_bias: bias of the momentum's decay beta = sigmoid(. + beta_bias), 0.9
      at the start by default; not read without momentum.
    walk: what runs the walk over chunks: "auto" (the kernels on a TPU where
      they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  dgd_scope: rule.Scope = "none"
  # Deviation from Titans ("sum"): a re-parametrisation of its step; the sum
  # diverges on repeated tokens (docs/mathematics.md 2.8).
  momentum: rule.Momentum = "ema"
  retention_target: rule.Retention = "zero"
  erase_of: rule.Erase = "whole"
  residual_clip: rule.Clip = 1.0
  memory: Annotated[str, OneOf("linear", *mlp.ARCHITECTURES)] = "mlp"
  hidden: Annotated[int, Whole(0)] = 0
  residual: bool = True
  value_norm: Annotated[str, OneOf("none", "l2")] = "none"
  span: Annotated[int, Whole(0)] = 0
  eta_max: Annotated[float, fields.POSITIVE] = 0.1
  eta_bias: Annotated[float, fields.LOGIT] = 0.0
  alpha_bias: Annotated[float, fields.LOGIT] = 4.0
  beta_bias: Annotated[float, fields.LOGIT] = 2.2
  walk: rule.Walk = "auto"

  def __post_init__(self):
    super().__post_init__()
    if self.span % self.chunk:
      raise ValueError(
        f"model.mixer.span must be 0 or a multiple of model.mixer.chunk="
        f"{self.chunk}, got {self.span}"
      )
    if self.span and (self.omega > 1 or self.inner_muon != "off"):
      raise ValueError(
        "model.mixer.span resets memories, which windows and inner Muon "
        "do not: set model.mixer.omega=1 and model.mixer.inner_muon='off', or "
        f"model.mixer.span=0; got {self.span}"
      )

  @property
  def forward(self) -> rule.Forward:
    """The architecture of the memory."""
    if self.memory == "linear":
      return linear.forward_residual if self.residual else linear.forward
    return mlp.forward(self.memory, self.residual)

  @property
  def memories(self) -> int:
    """Memories of a head: one, or a local and a global one."""
    return 2 if self.span else 1

  @property
  def gates(self) -> tuple[str, ...]:
    """Names of the gates with a bias, beta only with momentum."""
    return ("eta", "alpha", "beta") if self.has_momentum else ("eta", "alpha")


class TitansState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"q", "k", "v"} windows of the short convolutions.
    memory: fast weights and their clocks.
  """

  convs: dict[str, layers.ConvState]
  memory: memory.MemoryState | memory.spans.State


check = contract.check_heads


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer.

  Those of `layer`, gate {w_eta, w_alpha, w_beta (D,H), b_eta, b_alpha, b_beta
  (H,)} and memory (H,·,·), the learned start; with a window gate has w_gamma
  (D,H) too, and with a span there are memory/local and memory/wide.
  """
  options, D, H = model.mixer, model.width, model.heads
  biases = {
    "eta": options.eta_bias,
    "alpha": options.alpha_bias,
    "beta": options.beta_bias,
  }
  made = layer(model)
  for i, name in enumerate(options.gates):
    gate = leaf.under("gate", {name: leaf.kernel((D, H), leaf.IN, i)}, 8)
    made[f"gate/w_{name}"] = gate[f"gate/{name}"]
    bias = leaf.constant((H,), ("heads",), biases[name])
    made[f"gate/b_{name}"] = bias
  if options.omega > 1:
    gamma = {"w_gamma": leaf.kernel((D, H), leaf.IN, 0)}
    made |= leaf.under("gate", gamma, 8)
  start = lambda key: memory_init(key, model)
  if not options.span:
    return made | leaf.under("memory", leaf.memory(start, (9,)))
  made |= leaf.under("memory/local", leaf.memory(start, (9,)))
  return made | leaf.under("memory/wide", leaf.memory(start, (9, 0)))


def layer(model: contract.Dims) -> dict[str, leaf.Leaf]:
  """What is around the memory and its gates.

  w_q, w_k, w_v, w_g (D,HK), w_o (HK,D), conv_q, conv_k, conv_v (4,HK), norm
  {scale (K,)}.
  """
  D, inner, made = model.width, model.heads * model.head_dim, {}
  for i, name in enumerate(PROJECTED):
    made[f"w_{name}"] = leaf.kernel((D, inner), leaf.IN, 2 * i)
    made[f"conv_{name}"] = leaf.conv(inner, 2 * i + 1)
  std = layers.residual_std(model.layers)
  return made | {
    "w_g": leaf.kernel((D, inner), leaf.IN, 6),
    "w_o": leaf.kernel((inner, D), leaf.OUT, 7, std),
    "norm/scale": leaf.scale(model.head_dim),
  }


def memory_init(key: types.Array, model: contract.Dims) -> types.Params:
  """The learned start of the memory; its keys and queries have unit norm."""
  options, heads, head_dim = model.mixer, model.heads, model.head_dim
  if options.memory == "linear":
    return linear.init(key, heads, head_dim, head_dim)
  hidden = options.hidden or head_dim
  return mlp.init(key, heads, head_dim, hidden, arch=options.memory)


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: TitansState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, TitansState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer.

  Args:
    params: of one layer.
    x_BxTxD: normalised input.
    state: fast weights to resume from; None at the start of a sequence. From
      there packed documents must begin at multiples of `alignment`; later
      calls take them anywhere.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    y_BxTxD, the state after the call, and sums over real tokens for the level
    "memory", leaves [B,H].
  """
  fresh = state is None
  if state is None:
    state = init_state(params, x_BxTxD.shape[0], 0, model=model)
  return advance(
    params,
    x_BxTxD,
    None if fresh else state.convs,
    state.memory,
    segment_ids,
    model=model,
    at_edge=fresh or model.at_edge,
  )


def advance(
  params: types.Params,
  x_BxTxD: types.Array,
  convs: dict[str, layers.ConvState] | None,
  fast: memory.MemoryState | memory.spans.State,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
  at_edge: bool = False,
  rates: memory.Gates | None = None,
  update: Callable[..., Any] | None = None,
) -> tuple[types.Array, TitansState, dict[str, memory.Metrics]]:
  """`apply` from parts of a state.

  Args:
    params, x_BxTxD, segment_ids, model: as `apply`.
    convs: windows of the short convolutions; None at the start of a sequence.
    fast: fast weights and their clocks.
    at_edge: every row stands at the edge of a chunk, and documents of the call
      begin at such edges: spares the shift to each row's own.
    rates: in place of the gates that params have.
    update: in place of `memory.chunked.update`, called as it is.
  """
  options = model.mixer
  run: Any = update
  if update is None:
    run = memory.chunked.update
    if options.span:
      run = functools.partial(memory.spans.update, span=options.span)
  z, convs = layers.short_convs(
    params, x_BxTxD, PROJECTED, model.heads, convs, segment_ids
  )
  y_BxTxHxK, fast, metrics = run(
    options.forward,
    params["memory"],
    fast,
    layers.l2_norm(z["q"]),
    layers.l2_norm(z["k"]),
    layers.l2_norm(z["v"]) if options.value_norm == "l2" else z["v"],
    gates(params["gate"], x_BxTxD, options) if rates is None else rates,
    rule=options,
    segment_ids=segment_ids,
    at_edge=at_edge,
    aligned=at_edge,
    run=layers.run(options.walk, by_token=options.loops),
    name=f"titans_{options.memory}",
  )
  y_BxTxHxK = layers.rms_norm(y_BxTxHxK, params["norm"]["scale"])
  y_BxTxHK = y_BxTxHxK.astype(x_BxTxD.dtype).reshape(*x_BxTxD.shape[:2], -1)
  gate = jax.nn.silu(layers.dense(x_BxTxD, params["w_g"]))
  out = layers.dense(y_BxTxHK * gate, params["w_o"])
  return out, TitansState(convs, fast), {"memory": metrics}


def gates(
  gate: types.Params, x_BxTxD: types.Array, options: Options
) -> memory.Gates:
  """eta, log alpha, log beta and gamma, [B,T,H], float32 at least."""
  wide = layers.at_least_float32(x_BxTxD.dtype)
  logit = {
    name: layers.dense(x_BxTxD, gate[f"w_{name}"]).astype(wide)
    + gate[f"b_{name}"].astype(wide)[None, None]
    for name in options.gates
  }
  eta = options.eta_max * jax.nn.sigmoid(logit["eta"])
  log_beta = None
  if options.has_momentum:
    log_beta = jax.nn.log_sigmoid(logit["beta"])
  gamma = None
  if options.omega > 1:
    # Atlas does not say what its gammas are made of.
    gamma = layers.dense(x_BxTxD, gate["w_gamma"]).astype(wide)
    gamma = jax.nn.sigmoid(gamma)
  log_alpha = jax.nn.log_sigmoid(logit["alpha"])
  return memory.Gates(eta, log_alpha, log_beta, gamma)


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> TitansState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  dtype = layers.activation_dtype(model.dtype, params)
  inner = model.heads * model.head_dim
  window = layers.conv_state(batch_size, inner, dtype)
  options, starts = model.mixer, params["memory"]
  fast: memory.MemoryState | memory.spans.State
  if options.span:
    fast = memory.spans.start(
      starts, batch_size, model.head_dim, options, options.span
    )
  else:
    fast = memory.chunked.start(starts, batch_size, options)
  return TitansState(dict.fromkeys(PROJECTED, window), fast)


def starts(
  params: types.Params, model: contract.Dims
) -> dict[str, types.Params]:
  """What each memory of one layer learns from, by its place in the state."""
  if model.mixer.span:
    return {f"memory/{name}": own for name, own in params["memory"].items()}
  return {"memory": params["memory"]}


def alignment(model: contract.Dims) -> int:
  """The chunk, or the span: documents begin at its edges."""
  return model.mixer.span or model.mixer.chunk


def rule_name(options: Options) -> str:
  """The rule in the words of the level card."""
  erases = f"DGD ({options.dgd_coef})"
  name = "GD" if options.dgd_scope == "none" else erases
  if options.has_momentum:
    name += f" + {options.momentum} momentum"
  if options.omega > 1:
    name += f" of {options.omega} tokens"
  if options.inner_muon != "off":
    name += f" by Muon at each {options.inner_muon}"
  if options.span:
    name += f", local to {options.span} tokens and global"
  return name + ", retention"


def levels(model: contract.Dims) -> list[LevelRow]:
  """The memory; its start is learned."""
  options = model.mixer
  return [
    LevelRow(
      name="Titans memory",
      kind="memory",
      chunk=options.chunk,
      bptt=1 if options.stop_grad_writes else None,
      objective=options.objective,
      rule=rule_name(options),
      transfer="init",
      state_bytes=contract.state_bytes(leaves(model), init_state, model),
      parameters=model.layers * leaf.count(leaves(model), "memory"),
    )
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer."""
  del tokens
  options, D, H = model.mixer, model.width, model.heads
  gates = len(options.gates) + (options.omega > 1)
  return counting.Flops(
    projections=10.0 * D * D + 2.0 * D * H * gates,
    memories=H * of_memory(model),
  )


def of_memory(model: contract.Dims) -> float:
  """FLOPs of a token and head in its memories."""
  options, K = model.mixer, model.head_dim
  shapes = counting.layers_of(options.memory, K, options.hidden)
  normed = options.memory == "mlp_ln"
  total = counting.chunked(shapes, options, normed=normed, loop=options.loops)
  if options.span:
    wide = memory.spans.wide_rule(options, options.span)
    total += counting.chunked(shapes, wide, normed=normed)
    total += counting.chunked({"w": (K, K)}, memory.spans.keys_rule(options))
  return total


LAYERS, WHOLE = 1, None
residual, grows = contract.around(apply), contract.bounded
