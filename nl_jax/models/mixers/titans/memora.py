"""Memora (Miras): a deep memory whose weights stay on a simplex.

    W <- softmax(alpha log W - eta grad |M(k) - v|^2 / 2)
    alpha, eta: one for each key channel, sigmoid(x w_down w_up + b)

Miras, arXiv 2504.13173: retention by relative entropy in place of the squared
norm. It is the layer of Titans (`titans`) with this rule, a layer norm in the
memory and gates of a channel.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from nl_jax import fields, memory, types
from nl_jax.fields import OneOf, Only
from nl_jax.levels import LevelRow
from nl_jax.memory import rule
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.titans import lmm as titans

_GATES = ("eta", "alpha")


@dataclasses.dataclass(frozen=True)
class Options(titans.Options):
  """The switches of `titans.Options`, but for what makes it Memora, and this.

  Attributes:
    rank: inner width of the gates' projections (Miras: 32 to 64).
    lag: columns are made to sum to 1 at the first token of a chunk alone, and
      the rest of it runs at once; off: at every token, one after the other.
  """

  dgd_scope: Annotated[str, Only("none", titans.LMM)] = "none"
  momentum: Annotated[str, Only("off", titans.LMM)] = "off"
  retention_target: Annotated[str, Only("zero", titans.LMM)] = "zero"
  omega: Annotated[int, Only(1, titans.LMM)] = 1
  span: Annotated[int, Only(0, titans.LMM)] = 0
  memory: Annotated[str, Only("mlp_ln", titans.LMM)] = "mlp_ln"
  # At 0.1 gradients reach 1e4 at 256 tokens; ours.
  eta_max: Annotated[float, fields.POSITIVE] = 0.01
  walk: Annotated[
    str,
    OneOf("auto", "xla", otherwise="no kernel keeps weights on a simplex"),
  ] = "auto"
  rank: rule.Count = 32
  lag: bool = False

  # Deviation from Miras, which does not say in what the rest of a chunk is
  # linear: the logarithms are, because weights would leave the simplex; and
  # without `lag` the rule is that of the definition at every token.
  @property
  def loops(self) -> bool:
    """Token by token, but for `lag`."""
    return not self.lag


check = titans.check
alignment = titans.alignment


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer.

  As `titans.leaves`, but for gate {w_eta_down, w_alpha_down (D,rank), w_eta_up,
  w_alpha_up (rank,HK), b_eta, b_alpha (HK,)} and memory, of which the softmax
  over the inputs is the learned start.
  """
  options, D, inner = model.mixer, model.width, model.heads * model.head_dim
  biases, gate = {"eta": options.eta_bias, "alpha": options.alpha_bias}, {}
  for i, name in enumerate(_GATES):
    down, up = ("embed", "mem_out"), ("mem_in", "heads")
    shape = (D, options.rank)
    gate[f"w_{name}_down"] = leaf.kernel(shape, down, 2 * i)
    shape = (options.rank, inner)
    gate[f"w_{name}_up"] = leaf.kernel(shape, up, 2 * i + 1)
    gate[f"b_{name}"] = leaf.constant((inner,), ("heads",), biases[name])
  # Logarithms of generic size: with small ones all units would be alike.
  start = lambda key: jax.tree.map(
    lambda w: w / jnp.std(w), titans.memory_init(key, model)
  )
  return {
    **titans.layer(model),
    **leaf.under("gate", gate, 0),
    **leaf.under("memory", leaf.memory(start, (9,))),
  }


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: titans.TitansState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, titans.TitansState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer; arguments and returns as `titans.apply`."""
  fresh = state is None
  if state is None:
    state = init_state(params, x_BxTxD.shape[0], 0, model=model)
  return titans.advance(
    {**params, "memory": _start(params)},
    x_BxTxD,
    None if fresh else state.convs,
    state.memory,
    segment_ids,
    model=model,
    at_edge=fresh or model.at_edge,
    rates=gates(params["gate"], x_BxTxD, model),
    update=functools.partial(memory.simplex.update, lag=model.mixer.lag),
  )


def _start(params: types.Params) -> types.Params:
  """The logarithms of the learned start."""
  return jax.tree.map(
    lambda w: jax.nn.log_softmax(
      w.astype(layers.at_least_float32(w.dtype)), axis=-2
    ),
    params["memory"],
  )


def gates(
  gate: types.Params, x_BxTxD: types.Array, model: contract.Dims
) -> memory.Gates:
  """eta and log alpha, [B,T,H,K], float32 at least."""
  wide = layers.at_least_float32(x_BxTxD.dtype)
  logit = {}
  for name in _GATES:
    z = layers.dense(x_BxTxD, gate[f"w_{name}_down"])
    z = layers.dense(z, gate[f"w_{name}_up"]).astype(wide)
    z = z + gate[f"b_{name}"].astype(wide)[None, None]
    logit[name] = z.reshape(*z.shape[:2], model.heads, model.head_dim)
  eta = model.mixer.eta_max * jax.nn.sigmoid(logit["eta"])
  return memory.Gates(eta, jax.nn.log_sigmoid(logit["alpha"]))


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> titans.TitansState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  return titans.init_state(
    {**params, "memory": _start(params)}, batch_size, length, model=model
  )


def starts(
  params: types.Params, model: contract.Dims
) -> dict[str, types.Params]:
  """The learned start of the memory; logarithms."""
  del model
  return {"memory": _start(params)}


def levels(model: contract.Dims) -> list[LevelRow]:
  """The memory; its start is learned."""
  return [
    dataclasses.replace(row, name="Memora memory", rule="GD on the simplex")
    for row in titans.levels(model)
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer, with gates of a channel through `rank`."""
  del tokens
  D = model.width
  return counting.Flops(
    projections=10.0 * D * D + 8.0 * D * model.mixer.rank,
    memories=model.heads * titans.of_memory(model),
  )


LAYERS, WHOLE = 1, None
residual, grows = contract.around(apply), contract.bounded
