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
import itertools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import fields, memory, types
from nl_jax.fields import Whole
from nl_jax.levels import LevelRow
from nl_jax.memory import linear, rule
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract

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


def _gated(model: contract.Dims) -> bool:
  return model.arch != "deltanet"


def _corrected(model: contract.Dims) -> bool:
  return model.arch == "comba"


def _value_dim(model: contract.Dims) -> int:
  return model.mixer.value_dim or model.head_dim


def _widths(model: contract.Dims) -> dict[str, int]:
  """Channels of each projection: HK, HK, HV."""
  keys = model.heads * model.head_dim
  return {"q": keys, "k": keys, "v": model.heads * _value_dim(model)}


def check(model: contract.Dims) -> None:
  """DeltaNet's heads fill the width; those of the others may be any number."""
  if not _gated(model):
    contract.check_heads(model)
  if model.mixer.correction and not _corrected(model):
    raise ValueError(
      f"model.arch={model.arch!r} corrects no query, got model.mixer."
      f"correction={model.mixer.correction}: set it to 0, or use "
      "model.arch='comba'"
    )


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer.

  w_q, w_k (D,HK), w_v (D,HV), w_beta (D,H), w_o (HV,D), conv_q, conv_k (4,HK),
  conv_v (4,HV), norm {scale (V,)}; with `output_gate` w_g (D,HV); gated: w_a
  (D,H), A_log, dt_bias (H,); Comba: erase, correction (H,), d and D of the
  equations.
  """
  D, H, widths = model.width, model.heads, _widths(model)
  key, made = itertools.count(), {}
  for name, inner in widths.items():
    made[f"w_{name}"] = leaf.kernel((D, inner), leaf.IN, next(key))
    made[f"conv_{name}"] = leaf.conv(inner, next(key))
  made["w_beta"] = leaf.kernel((D, H), leaf.IN, next(key))
  if model.mixer.output_gate:
    made["w_g"] = leaf.kernel((D, widths["v"]), leaf.IN, next(key))
  if _gated(model):
    made["w_a"] = leaf.kernel((D, H), leaf.IN, next(key))
    made |= decays(H, next(key))
  if _corrected(model):
    made["erase"] = leaf.constant((H,), ("heads",), 1.0)
    correction = model.mixer.correction
    made["correction"] = leaf.constant((H,), ("heads",), correction)
  std = layers.residual_std(model.layers)
  made["w_o"] = leaf.kernel((widths["v"], D), leaf.OUT, next(key), std)
  return made | {"norm/scale": leaf.scale(_value_dim(model))}


def decays(heads: int, key: int) -> dict[str, leaf.Leaf]:
  """A_log and dt_bias (H,) of Mamba-2."""

  def A_log(key: types.Array, shape: tuple[int, ...]) -> types.Array:
    # The lower end keeps the logarithm finite.
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-4, _A_MAX))

  def dt_bias(key: types.Array, shape: tuple[int, ...]) -> types.Array:
    low, high = (math.log(x) for x in _DT_RANGE)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    # The inverse of softplus: dt + log(1 - exp(-dt)).
    return dt + jnp.log(-jnp.expm1(-dt))

  one = lambda init, place: leaf.Leaf(
    (heads,), ("heads",), init, key=(key, place)
  )
  return {"A_log": one(A_log, 0), "dt_bias": one(dt_bias, 1)}


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: DeltaState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, DeltaState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer.

  Args:
    params: of one layer.
    x_BxTxD: normalised input.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    y_BxTxD, the state after the call, and sums over real tokens for the level
    "memory", leaves [B,H].
  """
  fresh = state is None
  if state is None:
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


def _start(model: contract.Dims, dtype: jnp.dtype) -> types.Params:
  """Memories start empty: no learned start."""
  shape = (model.heads, model.head_dim, _value_dim(model))
  return {"w": jnp.zeros(shape, dtype)}


def _gates(
  params: types.Params, x_BxTxD: types.Array, model: contract.Dims
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
  model: contract.Dims,
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


def levels(model: contract.Dims) -> list[LevelRow]:
  """The matrix memory; it has no parameters of its own."""
  return [
    LevelRow(
      name=_NAMES[model.arch],
      kind="memory",
      chunk=1,
      bptt=None,
      objective="dot",
      rule="DGD (delta rule)" + (", retention" if _gated(model) else ""),
      transfer="parametric",
      state_bytes=contract.state_bytes(leaves(model), init_state, model),
    )
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer."""
  del tokens
  H, K, V = model.heads, model.head_dim, _value_dim(model)
  columns = H * (2 * K + V * (2 + model.mixer.output_gate) + 1 + _gated(model))
  return counting.Flops(
    projections=2.0 * model.width * columns,
    memories=H * counting.chunked({"w": (K, V)}, model.mixer.rule),
  )


LAYERS, WHOLE = 1, None
residual = contract.around(apply)
starts, alignment, grows = contract.empty, contract.anywhere, contract.bounded
