"""RetNet: matrix memories that forget at a fixed rate (arXiv 2307.08621).

    q, k = RoPE(x W_q), RoPE(x W_k);  v = x W_v                 heads of K, 2 K
    S <- gamma_h S + k^T v;   gamma_h = 1 - 2^(-5 - h),  h = 0 ... H - 1
    y = K^-1/2 q S;   out = (RMSNorm_V(y) * SiLU(x W_g)) W_o

In the words of Nested Learning a linear memory with the objective -<k S, v>,
gradient descent and a retention that nothing learns (docs/mathematics.md 6).
The result does not depend on the chunk, so documents may begin anywhere;
positions restart with them.
"""

# Deviation: RoPE in place of the paper's xPos, and RMSNorm in place of
# GroupNorm, because the code base that others compare with has it so
# (flash-linear-attention).

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import fields, memory, types
from nl_jax.kernels.rank_one import segments
from nl_jax.levels import LevelRow
from nl_jax.memory import linear
from nl_jax.memory import rule as rules
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract

_VALUES = 2  # V = 2 K.


@dataclasses.dataclass(frozen=True)
class Options:
  """The switches; none of them changes a number.

  Attributes:
    chunk: tokens computed at once.
    remat_group: chunks between states kept for the backward pass; 1 is fastest.
    walk: what runs the walk over chunks: "auto" (the kernels on a TPU where
      they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  chunk: rules.Count = 64
  remat_group: rules.Count = 4
  walk: rules.Walk = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))

  @property
  def rule(self) -> memory.Rule:
    """Gradient descent with decay, which erases nothing."""
    return memory.Rule(
      chunk=self.chunk,
      objective="dot",
      dgd_scope="none",
      retention_target="zero",
      erase_of="whole",
      remat_group=self.remat_group,
    )


class RetNetState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    memory: fast weights w (B,H,K,2K) and their clocks.
    position_B: int32, tokens of the current document so far, modulo 2^32, see
      `layers.rope`.
  """

  memory: memory.MemoryState
  position_B: types.Array


def check(model: contract.Dims) -> None:
  """Raises ValueError for heads that do not fit the width, or are odd."""
  contract.check_heads(model, even=True)


def log_retention(heads: int) -> types.Array:
  """log gamma_h [H], gamma_h = 1 - 2^(-5 - h) (paper sec. 2.2).

  Args:
    heads: H.
  """
  dtype = jnp.result_type(float)
  return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=dtype))))


def leaves(model: contract.Dims) -> contract.Leaves:
  """w_q, w_k (D,D), w_v, w_g (D,2D), w_o (2D,D), norm {scale (2K,)}."""
  D, wide = model.width, _VALUES * model.width
  std = layers.residual_std(model.layers)
  return {
    "w_q": leaf.kernel((D, D), leaf.IN, 0),
    "w_k": leaf.kernel((D, D), leaf.IN, 1),
    "w_v": leaf.kernel((D, wide), leaf.IN, 2),
    "w_g": leaf.kernel((D, wide), leaf.IN, 3),
    "w_o": leaf.kernel((wide, D), leaf.OUT, 4, std),
    "norm/scale": leaf.scale(_VALUES * model.head_dim),
  }


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: RetNetState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, RetNetState, dict[str, memory.Metrics]]:
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
  batch, tokens, _ = x_BxTxD.shape
  if state is None:
    state = init_state(params, batch, 0, model=model)
  heads = lambda n: layers.dense(x_BxTxD, params[f"w_{n}"]).reshape(
    batch, tokens, model.heads, -1
  )
  positions_BxT, position_B = _positions(state, segment_ids, tokens)
  dtype = state.memory.w["w"].dtype
  q_BxTxHxK = layers.rope(heads("q").astype(dtype), positions_BxT)
  k_BxTxHxK = layers.rope(heads("k").astype(dtype), positions_BxT)
  decay_H = log_retention(model.heads).astype(dtype)
  decay_BxTxH = jnp.broadcast_to(decay_H[None, None], k_BxTxHxK.shape[:3])
  y_BxTxHxV, fast, metrics = linear.update(
    None,
    state.memory,
    q_BxTxHxK * model.head_dim**-0.5,
    k_BxTxHxK,
    heads("v"),
    memory.Gates(jnp.ones_like(decay_BxTxH), decay_BxTxH),
    rule=model.mixer.rule,
    segment_ids=segment_ids,
    at_edge=fresh or model.at_edge,
    chunk_free=True,
    run=layers.run(model.mixer.walk),
  )
  y_BxTxHxV = layers.rms_norm(y_BxTxHxV, params["norm"]["scale"])
  y_BxTxHV = y_BxTxHxV.astype(x_BxTxD.dtype).reshape(batch, tokens, -1)
  y_BxTxHV *= jax.nn.silu(layers.dense(x_BxTxD, params["w_g"]))
  out = layers.dense(y_BxTxHV, params["w_o"])
  return out, RetNetState(fast, position_B), {"memory": metrics}


def _positions(
  state: RetNetState, segment_ids: types.Array | None, tokens: int
) -> tuple[types.Array, types.Array]:
  """[B,T] places of a call's tokens in their documents, and [B] the next."""
  if segment_ids is None:
    steps = jnp.arange(tokens, dtype=jnp.int32)
    return state.position_B[:, None] + steps[None], state.position_B + tokens
  index = segments.running_index(segment_ids, state.memory.segment)
  return layers.positions(index, segment_ids > 0, state.position_B)


def _start(model: contract.Dims, dtype: jnp.dtype) -> types.Params:
  """Memories start empty: no learned start."""
  K = model.head_dim
  return {"w": jnp.zeros((model.heads, K, _VALUES * K), dtype)}


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> RetNetState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  start = _start(model, jnp.result_type(params["w_q"], jnp.float32))
  return RetNetState(
    memory.chunked.start(start, batch_size, model.mixer.rule),
    jnp.zeros((batch_size,), jnp.int32),
  )


def levels(model: contract.Dims) -> list[LevelRow]:
  """The matrix memory; it has no parameters of its own."""
  return [
    LevelRow(
      name="RetNet",
      kind="memory",
      chunk=1,
      bptt=None,
      objective="dot",
      rule="GD, fixed retention",
      transfer="parametric",
      state_bytes=contract.state_bytes(leaves(model), init_state, model),
    )
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer."""
  del tokens
  K = model.head_dim
  one = counting.chunked({"w": (K, _VALUES * K)}, model.mixer.rule)
  return counting.Flops(
    projections=16.0 * model.width**2, memories=model.heads * one
  )


LAYERS, WHOLE = 1, None
residual = contract.around(apply)
starts, alignment, grows = contract.empty, contract.anywhere, contract.bounded
