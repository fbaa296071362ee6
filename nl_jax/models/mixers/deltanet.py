"""DeltaNet, Gated DeltaNet, Comba: memories that learn by the delta rule.

    q, k, v = SiLU(conv4(x W));  q, k to unit norm;  beta = sigmoid(x W_beta)
    S <- a S + beta k^T (v - k (a S))         a = 1, or gated: exp(log_a) < 1
    log_a = -exp(A_log) softplus(x W_a + dt_bias)
    y = K^-1/2 q S;  out = RMSNorm_V(y) W_o, or (RMSNorm_V(y) * SiLU(x W_g)) W_o

Comba is gated, erases less than it writes and reads with a corrected query:

    p = sigmoid(d) k;   S <- a S + beta k^T (v - p (a S))
    y = K^-1/2 (q - D p) S;  out = (RMSNorm_V(y) * sigmoid(x W_g)) W_o

DeltaNet: arXiv 2406.06484; Gated DeltaNet: arXiv 2412.06464; Comba: arXiv
2506.02475 (docs/mathematics.md 6). In the words of Nested Learning a linear
memory with the objective -<k S, v> and delta gradient descent (paper eq. 56):
the rule of docs/mathematics.md 2.3 with the objective `dot`, the write rate
beta and the erase rate a beta. The result does not depend on the chunk, so
documents may begin anywhere.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import card, fields, memory, types
from nl_jax.fields import Whole
from nl_jax.memory import linear, rule
from nl_jax.models import layers

if TYPE_CHECKING:
  from nl_jax.models import lm

_DT_RANGE = (1e-3, 0.1)  # Start of softplus(dt_bias), as in Mamba.
_A_MAX = 16.0  # A = exp(A_log) starts uniform in (0, 16).
_NAMES = {
  "deltanet": "DeltaNet",
  "gated_deltanet": "Gated DeltaNet",
  "comba": "Comba",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """The switches of all three.

  Attributes:
    value_dim: V, value width of a head; 0: the key width K (GDN: twice).
    output_gate: a gate SiLU(x W_g), in Comba sigmoid(x W_g), before the
      output kernel.
    allow_neg_eigval: beta in (0, 2) instead of (0, 1), so that a memory can
      change the sign of what it holds.
    correction: start of D in the reads q - D p, of Comba alone; its authors:
      1, or 0.02 when small.
    chunk: tokens computed at once; changes no number.
    remat_group: chunks between states kept for the backward pass; 1 is fastest.
    walk: what runs the walk over chunks: "auto" (the kernels on a TPU where
      they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  value_dim: Annotated[int, Whole(0)] = 0
  output_gate: bool = False
  allow_neg_eigval: bool = False
  correction: Annotated[float, fields.Number()] = 0.0
  chunk: rule.Count = 64
  remat_group: rule.Count = 4
  walk: rule.Walk = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))

  @property
  def rule(self) -> memory.Rule:
    """The delta rule, decay first."""
    return memory.Rule(
      chunk=self.chunk,
      objective="dot",
      dgd_coef="decayed",
      retention_target="zero",
      erase_of="whole",
      remat_group=self.remat_group,
    )


class DeltaState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"q", "k", "v"} windows of the short convolutions.
    memory: fast weights w (B,H,K,V) and their clocks.
  """

  convs: dict[str, layers.ConvState]
  memory: memory.MemoryState


def _gated(model: "lm.LanguageModel") -> bool:
  return model.arch != "deltanet"


def _corrected(model: "lm.LanguageModel") -> bool:
  return model.arch == "comba"


def _value_dim(model: "lm.LanguageModel") -> int:
  return model.mixer.value_dim or model.head_dim


def _widths(model: "lm.LanguageModel") -> dict[str, int]:
  """Channels of each projection: HK, HK, HV."""
  keys = model.heads * model.head_dim
  return {"q": keys, "k": keys, "v": model.heads * _value_dim(model)}


def check(model: "lm.LanguageModel") -> None:
  """DeltaNet's heads fill the width; those of the others may be any number."""
  if not _gated(model):
    layers.check_heads(model)
  if model.mixer.correction and not _corrected(model):
    raise ValueError(
      f"model.arch={model.arch!r} corrects no query, got model.mixer."
      f"correction={model.mixer.correction}: set it to 0, or use "
      "model.arch='comba'"
    )


def init(key: types.Array, model: "lm.LanguageModel") -> types.Params:
  """Parameters of one layer.

  Returns:
    w_q, w_k (D,HK), w_v (D,HV), w_beta (D,H), w_o (HV,D), conv_q, conv_k
    (4,HK), conv_v (4,HV), norm {scale (V,)}; with `output_gate` w_g (D,HV);
    gated: w_a (D,H), A_log, dt_bias (H,); Comba: erase, correction (H,), d
    and D of the equations.
  """
  widths, heads = _widths(model), (model.width, model.heads)
  keys = iter(jax.random.split(key, 12))
  params = {}
  for name, inner in widths.items():
    params[f"w_{name}"] = layers.normal(next(keys), (model.width, inner))
    params[f"conv_{name}"] = layers.conv_init(next(keys), inner)
  params["w_beta"] = layers.normal(next(keys), heads)
  if model.mixer.output_gate:
    params["w_g"] = layers.normal(next(keys), (model.width, widths["v"]))
  if _gated(model):
    params["w_a"] = layers.normal(next(keys), heads)
    params |= _decay_init(next(keys), model.heads)
  if _corrected(model):
    params["erase"] = jnp.ones((model.heads,))
    params["correction"] = jnp.full((model.heads,), model.mixer.correction)
  std = layers.residual_std(model.layers)
  params["w_o"] = layers.normal(next(keys), (widths["v"], model.width), std)
  params["norm"] = {"scale": jnp.ones((_value_dim(model),))}
  return params


def _decay_init(key: types.Array, heads: int) -> types.Params:
  """A_log and dt_bias of Mamba-2, float32 [H]."""
  a_key, dt_key = jax.random.split(key)
  # The lower end keeps the logarithm finite.
  A = jax.random.uniform(a_key, (heads,), jnp.float32, 1e-4, _A_MAX)
  low, high = (math.log(x) for x in _DT_RANGE)
  dt = jnp.exp(jax.random.uniform(dt_key, (heads,), jnp.float32, low, high))
  # The inverse of softplus: dt + log(1 - exp(-dt)).
  return {"A_log": jnp.log(A), "dt_bias": dt + jnp.log(-jnp.expm1(-dt))}


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: DeltaState | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
) -> tuple[types.Array, DeltaState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer.

  Args:
    params: of `init`.
    x_BxTxD: normalised input.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    y_BxTxD, the state after the call, and sums over real tokens for the level
    "memory", leaves [B,H].
  """
  fresh = state is None
  if fresh:
    state = init_state(params, x_BxTxD.shape[0], 0, model=model)
  z, convs = layers.short_convs(
    params,
    x_BxTxD,
    ("q", "k", "v"),
    model.heads,
    None if fresh else state.convs,
    segment_ids,
  )
  q_BxTxHxK, k_BxTxHxK = layers.l2_norm(z["q"]), layers.l2_norm(z["k"])
  v_BxTxHxV, gate = z["v"], jax.nn.silu
  if _corrected(model):
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxV = closed_loop(
      params, q_BxTxHxK, k_BxTxHxK, v_BxTxHxV
    )
    gate = jax.nn.sigmoid
  y_BxTxHxV, fast, metrics = linear.update(
    None,
    state.memory,
    q_BxTxHxK * model.head_dim**-0.5,
    k_BxTxHxK,
    v_BxTxHxV,
    _gates(params, x_BxTxD, model),
    rule=model.mixer.rule,
    segment_ids=segment_ids,
    at_edge=fresh or model.at_edge,
    chunk_free=True,
    run=layers.run(
      model.mixer.walk,
      rate=2.0 if model.mixer.allow_neg_eigval else 1.0,
      dtype=x_BxTxD.dtype,
    ),
  )
  y_BxTxHxV = layers.rms_norm(y_BxTxHxV, params["norm"]["scale"])
  y_BxTxHV = y_BxTxHxV.astype(x_BxTxD.dtype).reshape(*x_BxTxD.shape[:2], -1)
  if model.mixer.output_gate:
    y_BxTxHV *= gate(layers.dense(x_BxTxD, params["w_g"]))
  out = layers.dense(y_BxTxHV, params["w_o"])
  return out, DeltaState(convs, fast), {"memory": metrics}


def closed_loop(
  params: types.Params, q: types.Array, k: types.Array, v: types.Array
) -> tuple[types.Array, types.Array, types.Array]:
  """What the delta rule is fed with to be Comba's.

  With s = sigmoid(d): k^T (v - s k S) = k'^T (v' - k' S) for k' = sqrt(s) k,
  v' = v / sqrt(s), and q' = q - D s k reads.

  Args:
    params: erase, correction [H], d and D.
    q, k: [B,T,H,K], unit.
    v: [B,T,H,V].

  Returns:
    q', k', v'.
  """
  # Deviation: s scales unit keys; where keys are made unit after it, as in
  # flash-linear-attention, it cancels and nothing learns it.
  head = lambda name: params[name].astype(k.dtype)[None, None, :, None]
  s = jax.nn.sigmoid(head("erase"))
  q = q - head("correction") * s * k
  return q, jnp.sqrt(s) * k, v.astype(k.dtype) / jnp.sqrt(s)


def _start(model: "lm.LanguageModel", dtype: jnp.dtype) -> types.Params:
  """Memories start empty: no learned start."""
  shape = (model.heads, model.head_dim, _value_dim(model))
  return {"w": jnp.zeros(shape, dtype)}


def _gates(
  params: types.Params, x_BxTxD: types.Array, model: "lm.LanguageModel"
) -> memory.Gates:
  """beta and log a, [B,T,H], float32 at least."""
  wide = layers.at_least_float32(x_BxTxD.dtype)
  logit = lambda name: layers.dense(x_BxTxD, params[name]).astype(wide)
  beta = jax.nn.sigmoid(logit("w_beta"))
  if model.mixer.allow_neg_eigval:
    beta = 2.0 * beta
  if not _gated(model):
    return memory.Gates(beta, jnp.zeros_like(beta))
  vector = lambda name: params[name].astype(wide)[None, None]
  step = jax.nn.softplus(logit("w_a") + vector("dt_bias"))
  return memory.Gates(beta, -jnp.exp(vector("A_log")) * step)


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: "lm.LanguageModel",
) -> DeltaState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  dtype = layers.activation_dtype(model.dtype, params)
  convs = {
    name: layers.conv_state(batch_size, inner, dtype)
    for name, inner in _widths(model).items()
  }
  start = _start(model, jnp.result_type(params["w_q"], jnp.float32))
  return DeltaState(
    convs, memory.chunked.start(start, batch_size, model.mixer.rule)
  )


def alignment(model: "lm.LanguageModel") -> int:
  """1: documents may begin at any token."""
  del model
  return 1


def parameter_count(model: "lm.LanguageModel") -> int:
  """DeltaNet 4 D² + D H + 12 D + K, gated about 6 D² at V = 2 K, one layer.

  Comba: 2 H more than gated.
  """
  D, H, widths = model.width, model.heads, _widths(model)
  count = (D + layers.CONV_WIDTH) * sum(widths.values()) + D * H
  count += D * widths["v"] * (1 + model.mixer.output_gate) + _value_dim(model)
  return count + (D * H + 2 * H) * _gated(model) + 2 * H * _corrected(model)


def rows(model: "lm.LanguageModel") -> list[card.Row]:
  """The matrix memory; it has no parameters of its own."""
  return [
    card.Row(
      name=_NAMES[model.arch],
      kind="memory",
      chunk=1,
      bptt=None,
      objective="dot",
      rule="DGD (delta rule)" + (", retention" if _gated(model) else ""),
      transfer="parametric",
      state_bytes=layers.size_of_state(model),
    )
  ]
