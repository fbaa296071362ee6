"""Gated DeltaNet-2: gates of a channel for decay, erase and write.

    q, k, v = SiLU(conv4(x W));  q, k to unit norm
    g = -exp(A_log) softplus(x W_down W_up + dt_bias), at least -5        [K]
    b = sigmoid(x W_erase) [K];   w = sigmoid(x W_write) [V]
    S <- diag(e^g) S;   S <- S + k^T (w v - (b k) S)
    y = K^-1/2 q S;  out = (RMSNorm_V(y) * SiLU(x G_down G_up)) W_o

Gated DeltaNet-2, arXiv 2605.22791. In the words of Nested Learning a linear
memory with the objective -<k S, v>, delta gradient descent whose erase and
write have rates of their own for each channel, and a retention of each. With b
= w = beta, one number a head, it is Kimi Delta Attention (arXiv 2510.26692),
and with one decay a head Gated DeltaNet. The result does not depend on the
chunk, so documents may begin anywhere.
"""

# Deviation: the paper's shapes of the projections were not to be had; decay and
# output gate go through a low rank, as in the public code of Kimi Delta
# Attention, and a token forgets no channel by more than e^-5, so that decays of
# 16 tokens stay in float32.

import dataclasses
import itertools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import fields, types
from nl_jax.fields import Whole
from nl_jax.kernels import general_delta_rule as ops
from nl_jax.kernels.rank_one import segments
from nl_jax.levels import LevelRow
from nl_jax.memory import rule
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract
from nl_jax.models.mixers import deltanet

_SLOWEST = -5.0  # Of g.
_BLOCK = 16  # Tokens whose decays have an origin of their own.


@dataclasses.dataclass(frozen=True)
class Options:
  """The switches.

  Attributes:
    value_dim: V, value width of a head; 0: the key width K.
    decay_rank: inner width of the projection to the decays g; ours.
    gate_rank: inner width of that to the output gate; ours.
    chunk: tokens computed at once; changes no number.
    remat_group: chunks between states kept for the backward pass; 1 is fastest.
    walk: what runs the walk over chunks: "auto" (the kernels on a TPU where
      they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  value_dim: Annotated[int, Whole(0)] = 0
  decay_rank: rule.Count = 128
  gate_rank: rule.Count = 128
  chunk: rule.Count = 64
  remat_group: rule.Count = 4
  walk: rule.Walk = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))


class State(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"q", "k", "v"} windows of the short convolutions.
    S_BxHxKxV: float32 at least.
  """

  convs: dict[str, layers.ConvState]
  S_BxHxKxV: types.Array


def _widths(model: contract.Dims) -> dict[str, int]:
  """Channels of each projection: HK, HK, HV."""
  keys = model.heads * model.head_dim
  values = model.heads * (model.mixer.value_dim or model.head_dim)
  return {"q": keys, "k": keys, "v": values}


def check(model: contract.Dims) -> None:
  """Heads of any number and width will do."""
  del model


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer.

  w_q, w_k, w_erase (D,HK), w_v, w_write (D,HV), w_o (HV,D), conv_q, conv_k
  (4,HK), conv_v (4,HV), decay_down (D,R), decay_up (R,HK), gate_down (D,R),
  gate_up (R,HV), A_log (H,), dt_bias (HK,), norm {scale (V,)}.
  """
  D, H, widths, options = model.width, model.heads, _widths(model), model.mixer
  HK, HV, key, made = widths["k"], widths["v"], itertools.count(), {}
  for name, inner in (widths | {"erase": HK, "write": HV}).items():
    made[f"w_{name}"] = leaf.kernel((D, inner), leaf.IN, next(key))
  for name, inner in widths.items():
    made[f"conv_{name}"] = leaf.conv(inner, next(key))
  ranks = ("decay", options.decay_rank, HK), ("gate", options.gate_rank, HV)
  for name, R, inner in ranks:
    down = leaf.kernel((D, R), ("embed", "mem_out"), next(key))
    made[f"{name}_down"] = down
    # Of unit scale after a projection that is not.
    up = leaf.kernel((R, inner), ("mem_in", "heads"), next(key), R**-0.5)
    made[f"{name}_up"] = up
  made["A_log"] = deltanet.decays(H, next(key))["A_log"]
  made["dt_bias"] = deltanet.decays(HK, next(key))["dt_bias"]
  std = layers.residual_std(model.layers)
  made["w_o"] = leaf.kernel((HV, D), leaf.OUT, next(key), std)
  return made | {"norm/scale": leaf.scale(HV // H)}


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: State | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, State, dict]:
  """Mixes the tokens of one layer.

  Args:
    params: of one layer.
    x_BxTxD: normalised input.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    y_BxTxD, the state after the call, and no metrics.
  """
  fresh, options, dtype = state is None, model.mixer, x_BxTxD.dtype
  if state is None:
    state = init_state(params, x_BxTxD.shape[0], 0, model=model)
  z, convs = layers.short_convs(
    params, x_BxTxD, ("q", "k", "v"), model.heads,
    None if fresh else state.convs, segment_ids,
  )  # fmt: skip
  wide = state.S_BxHxKxV.dtype
  heads = lambda y: y.reshape(*y.shape[:2], model.heads, -1)
  project = lambda name: heads(layers.dense(x_BxTxD, params[name]))
  q = layers.l2_norm(z["q"]).astype(dtype)
  k = layers.l2_norm(z["k"]).astype(wide)
  v = jax.nn.sigmoid(project("w_write")) * z["v"]
  erase = jax.nn.sigmoid(project("w_erase").astype(wide))
  g, begins = _log_decay(params, x_BxTxD, model), None
  if segment_ids is not None:
    real = (segment_ids > 0)[..., None, None]
    g, k = jnp.where(real, g, 0.0), jnp.where(real, k, 0.0)
    before = state.convs["k"].segment_Bx3[:, -1]
    index = segments.running_index(segment_ids, before)
    begins = jnp.diff(index, axis=1, prepend=0) > 0
  run = layers.run(options.walk)
  y_BxTxHxV, S = ops.general_delta_rule(
    q * model.head_dim**-0.5, k, v, g, (erase * k * jnp.exp(g), k),
    state.S_BxHxKxV, begins, chunk=options.chunk, block=_BLOCK,
    remat_group=options.remat_group, implementation=run.implementation,
    spec=run.spec,
  )  # fmt: skip
  y_BxTxHxV = layers.rms_norm(y_BxTxHxV, params["norm"]["scale"])
  y_BxTxHV = y_BxTxHxV.astype(dtype).reshape(*x_BxTxD.shape[:2], -1)
  gate = layers.dense(x_BxTxD, params["gate_down"])
  gate = jax.nn.silu(layers.dense(gate, params["gate_up"]))
  out = layers.dense(y_BxTxHV * gate, params["w_o"])
  return out, State(convs, S), {}


def _log_decay(
  params: types.Params, x_BxTxD: types.Array, model: contract.Dims
) -> types.Array:
  """g [B,T,H,K], from -5 to 0, float32 at least."""
  wide = layers.at_least_float32(x_BxTxD.dtype)
  step = layers.dense(x_BxTxD, params["decay_down"])
  step = layers.dense(step, params["decay_up"]).astype(wide)
  step = jax.nn.softplus(step + params["dt_bias"].astype(wide)[None, None])
  step = step.reshape(*step.shape[:2], model.heads, -1)
  rate = jnp.exp(params["A_log"].astype(wide))[None, None, :, None]
  return jnp.maximum(-rate * step, _SLOWEST)


def init_state(
  params: types.Params, batch_size: int, length: int, *, model: contract.Dims
) -> State:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  dtype, widths = layers.activation_dtype(model.dtype, params), _widths(model)
  convs = {
    name: layers.conv_state(batch_size, inner, dtype)
    for name, inner in widths.items()
  }
  shape = (batch_size, model.heads, model.head_dim, widths["v"] // model.heads)
  wide = jnp.result_type(params["w_q"], jnp.float32)
  return State(convs, jnp.zeros(shape, wide))


def levels(model: contract.Dims) -> list[LevelRow]:
  """The matrix memory; it has no parameters of its own."""
  return [
    LevelRow(
      name="Gated DeltaNet-2",
      kind="memory",
      chunk=1,
      bptt=None,
      objective="dot",
      rule="DGD (delta rule), gates of channels, retention",
      transfer="parametric",
      state_bytes=contract.state_bytes(leaves(model), init_state, model),
    )
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer; the memory is that of `rwkv7`, (K,V).

  What is erased stands at another key than what is written: keys against keys
  four times, one solve, and two writes for each read.
  """
  del tokens
  options, D, widths = model.mixer, model.width, _widths(model)
  HK, HV, C = widths["k"], widths["v"], options.chunk
  K, V = HK // model.heads, HV // model.heads
  low = options.decay_rank * (D + HK) + options.gate_rank * (D + HV)
  return counting.Flops(
    projections=2.0 * (D * (3 * HK + 3 * HV) + low),
    memories=model.heads * (8.0 * K * V + (8.0 * K + 7.0 * V) * C),
  )


LAYERS, WHOLE = 1, None
residual = contract.around(apply)
starts, alignment, grows = contract.empty, contract.anywhere, contract.bounded
