"""The mixer of HOPE: self-modifying Titans in a layer (paper eq. 94-97).

    z^q, z^k, z^v = SiLU(conv4(x W))              (Titans sec. 4.4)
    y = self-modifying Titans(z^q, z^k, z^v)      (nl_jax.memory)
    out = (RMSNorm_K(y) * SiLU(x W_g)) W_o

No attention and no positions. The paper leaves out norms, gates and residuals
"for clarity"; these follow Titans sec. 4.4 (docs/mathematics.md 3.2).
Projections W_k and W_v stand before the generators M_k, M_v, since memories are
per head and only a slow projection mixes heads; `gen_input="slice"` is the
literal alternative.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax

from nl_jax import types
from nl_jax.levels import LevelRow
from nl_jax.memory import self_modifying
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract

Options = self_modifying.Options


def check(model: contract.Dims) -> None:
  """Raises ValueError for heads that do not fill the width."""
  contract.check_heads(model)


class HopeState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"q", "k", "v"} windows of the short convolutions.
    memory: fast weights and their clocks.
  """

  convs: dict[str, layers.ConvState]
  memory: self_modifying.State


def _projected(model: contract.Dims) -> tuple[str, ...]:
  """The inputs that have a projection and a convolution of their own."""
  return ("q",) if model.mixer.gen_input == "slice" else ("q", "k", "v")


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer.

  w_q, w_k, w_v, w_g (D,HK), w_o (HK,D), conv_q, conv_k, conv_v (4,HK), norm
  {scale (K,)}, memory (see `self_modifying.init`) and, with
  `gate_source="static"`, static_gate {w_eta, w_alpha (D,H), b_eta, b_alpha
  (H,)}.
  """
  config, D, H, K = model.mixer, model.width, model.heads, model.head_dim
  inner, key = H * K, itertools.count()
  kernel = lambda: leaf.kernel((D, inner), leaf.IN, next(key))
  made = {f"w_{name}": kernel() for name in _projected(model)}
  for name in _projected(model):
    made[f"conv_{name}"] = leaf.conv(inner, next(key))
  made["w_g"] = kernel()
  std = layers.residual_std(model.layers)
  made["w_o"] = leaf.kernel((inner, D), leaf.OUT, next(key), std)
  made["norm/scale"] = leaf.scale(K)
  start = lambda key: self_modifying.init(key, config, H, K)
  made |= leaf.under("memory", leaf.memory(start, (next(key),)))
  if config.gate_source == "static":
    for name in ("eta", "alpha"):
      gate = leaf.kernel((D, H), leaf.IN, next(key))
      made[f"static_gate/w_{name}"] = gate
    biases = {"eta": config.eta_bias, "alpha": config.alpha_bias}
    for name, value in biases.items():
      bias = leaf.constant((H,), ("heads",), value)
      made[f"static_gate/b_{name}"] = bias
  return made


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: HopeState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, HopeState, dict[str, self_modifying.rules.Metrics]]:
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
    y_BxTxD, the state after the call, and sums over real tokens for the
    levels "generators" and "memory", leaves [B,H].
  """
  config = model.mixer
  fresh = state is None
  if state is None:
    state = init_state(params, x_BxTxD.shape[0], 0, model=model)
  heads = (*x_BxTxD.shape[:2], model.heads, model.head_dim)
  z, convs = layers.short_convs(
    params,
    x_BxTxD,
    _projected(model),
    model.heads,
    None if fresh else state.convs,
    segment_ids,
  )
  if config.gen_input == "slice":  # Keys and values have no projection.
    z |= dict.fromkeys(("k", "v"), x_BxTxD.reshape(heads))
  y_BxTxHxK, memory, metrics = self_modifying.update(
    params["memory"],
    state.memory,
    z["q"],
    z["k"],
    z["v"],
    options=config,
    static_gates=_static_gates(params, x_BxTxD),
    segment_ids=segment_ids,
    at_edge=fresh or model.at_edge,
    aligned=fresh or model.at_edge,
    run=layers.run(
      config.walk,
      by_token=config.gate_shape == "channel",
      # The proximal rate eta / (1 + eta |u|^2) of a unit key is below 1.
      rate=1.0 if config.dgd_coef == "prox" else config.eta_max,
    ),
  )
  y_BxTxHxK = layers.rms_norm(y_BxTxHxK, params["norm"]["scale"])
  y_BxTxHK = y_BxTxHxK.astype(x_BxTxD.dtype).reshape(*heads[:2], -1)
  gate = jax.nn.silu(layers.dense(x_BxTxD, params["w_g"]))
  out = layers.dense(y_BxTxHK * gate, params["w_o"])
  named = {k: m for k, m in metrics._asdict().items() if m is not None}
  return out, HopeState(convs, memory), named


def _static_gates(
  params: types.Params, x_BxTxD: types.Array
) -> tuple[types.Array, types.Array] | None:
  """Logits [B,T,H] of eta and alpha, straight from the layer's input."""
  if "static_gate" not in params:
    return None
  gate = params["static_gate"]
  logit = lambda name: (
    layers.dense(x_BxTxD, gate[f"w_{name}"]).astype(gate[f"b_{name}"].dtype)
    + gate[f"b_{name}"][None, None]
  )
  return logit("eta"), logit("alpha")


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> HopeState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  dtype = layers.activation_dtype(model.dtype, params)
  inner = model.heads * model.head_dim
  window = layers.conv_state(batch_size, inner, dtype)
  return HopeState(
    {name: window for name in _projected(model)},
    self_modifying.start(params["memory"], batch_size, model.mixer),
  )


def starts(
  params: types.Params, model: contract.Dims
) -> dict[str, types.Params]:
  """The learned starts of M_memory and of the generators."""
  made = {"memory/memory": params["memory"]["memory"]}
  if model.mixer.generator_roles:
    laid = self_modifying.lay(params["memory"], model.mixer)
    made["memory/generators"] = laid
  return made


def alignment(model: contract.Dims) -> int:
  """Both chunk lengths divide it: documents begin at chunk edges."""
  return math.lcm(model.mixer.chunk_memory, model.mixer.chunk_gen)


def _rule(model: contract.Dims) -> str:
  config = model.mixer
  name = "GD" if config.dgd_scope == "none" else f"DGD ({config.dgd_coef})"
  extra = f" + {config.momentum} momentum" if config.momentum != "off" else ""
  return name + extra + (", retention" if config.alpha_bias else "")


def levels(model: contract.Dims) -> list[LevelRow]:
  """The generators (the "projections" of Fig. 3) and M_memory."""
  config = model.mixer
  table = leaves(model)
  params = leaf.shapes(table)
  state = jax.eval_shape(lambda p: init_state(p, 1, 0, model=model), params)
  size = lambda tree: (
    model.layers
    * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  )
  memory = leaf.count(table, "memory/memory") * model.layers
  shared: dict[str, Any] = dict(
    kind="memory",
    bptt=1 if config.stop_grad_writes else None,
    rule=_rule(model),
    transfer="init",
  )
  made = LevelRow(
    name="self-modifying Titans",
    chunk=config.chunk_memory,
    objective=config.objective,
    state_bytes=size((state.convs, state.memory.memory)),
    parameters=memory,
    **shared,
  )
  if not config.generator_roles:
    return [made]
  return [
    LevelRow(
      name="projections " + ", ".join(config.generator_roles),
      chunk=config.chunk_gen,
      objective=f"{config.objective}, "
      f"{config.generators.value_source}-generated targets",
      state_bytes=size(state.memory.generators),
      parameters=memory * len(config.generator_roles),
      **shared,
    ),
    made,
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer: the generators, then M_memory."""
  del tokens
  config: self_modifying.Options = model.mixer
  D, H, K = model.width, model.heads, model.head_dim
  shapes = counting.layers_of(config.memory, K, config.hidden)
  how = dict(
    normed=config.memory == "mlp_ln", loop=config.gate_shape == "channel"
  )
  own = lambda part: (part.value_source == "self") * counting.product(shapes)
  made = counting.chunked(shapes, config.generator_rule, **how)
  made += own(config.generators)
  one = counting.chunked(shapes, config.memory_rule, **how) + own(config)
  roles = len(config.generator_roles)
  one += roles * made
  if roles and config.dgd_scope != "none" and not how["loop"]:
    # Keys against keys: once for all that have the same chunks.
    with_memory = config.chunk_gen == config.chunk_memory
    one -= (roles - 1 + with_memory) * 2.0 * K * config.chunk_gen
  projected = 1 if config.gen_input == "slice" else 3
  projections = 2.0 * D * H * K * (projected + 2)
  if config.gate_source == "static":
    projections += 4.0 * D * H
  elif config.gate_shape == "head":
    one += 4.0 * K
  return counting.Flops(projections=projections, memories=H * one)


LAYERS, WHOLE = 1, None
residual, grows = contract.around(apply), contract.bounded
