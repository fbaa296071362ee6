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

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import card, types
from nl_jax.memory import self_modifying
from nl_jax.models import layers

if TYPE_CHECKING:
  from nl_jax.models import lm


Options = self_modifying.Config


def check(model: "lm.LanguageModel") -> None:
  """Raises ValueError for heads that do not fill the width."""
  layers.check_heads(model)


class HopeState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"q", "k", "v"} windows of the short convolutions.
    memory: fast weights and their clocks.
  """

  convs: dict[str, layers.ConvState]
  memory: self_modifying.State


def _projected(model: "lm.LanguageModel") -> tuple[str, ...]:
  """The inputs that have a projection and a convolution of their own."""
  return ("q",) if model.mixer.gen_input == "slice" else ("q", "k", "v")


def init(key: types.Array, model: "lm.LanguageModel") -> types.Params:
  """Parameters of one layer.

  Returns:
    w_q, w_k, w_v, w_g (D,HK), w_o (HK,D), conv_q, conv_k, conv_v (4,HK),
    norm {scale (K,)}, memory (see `self_modifying.init`) and, with
    `gate_source="static"`, static_gate {w_eta, w_alpha (D,H), b_eta, b_alpha
    (H,)}.
  """
  config, inner = model.mixer, model.heads * model.head_dim
  keys = iter(jax.random.split(key, 12))
  kernel = lambda: layers.normal(next(keys), (model.width, inner))
  params = {f"w_{name}": kernel() for name in _projected(model)}
  for name in _projected(model):
    params[f"conv_{name}"] = layers.conv_init(next(keys), inner)
  params["w_g"] = kernel()
  std = layers.residual_std(model.layers)
  params["w_o"] = layers.normal(next(keys), (inner, model.width), std)
  params["norm"] = {"scale": jnp.ones((model.head_dim,))}
  params["memory"] = self_modifying.init(
    next(keys), config, model.heads, model.head_dim
  )
  if config.gate_source == "static":
    shape = (model.width, model.heads)
    params["static_gate"] = {
      "w_eta": layers.normal(next(keys), shape),
      "w_alpha": layers.normal(next(keys), shape),
      "b_eta": jnp.full((model.heads,), config.eta_bias, jnp.float32),
      "b_alpha": jnp.full((model.heads,), config.alpha_bias, jnp.float32),
    }
  return params


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: HopeState | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
) -> tuple[types.Array, HopeState, dict[str, self_modifying.rules.Metrics]]:
  """Mixes the tokens of one layer.

  Args:
    params: of `init`.
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
  if fresh:
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
  sliced = x_BxTxD.reshape(heads) if config.gen_input == "slice" else None
  y_BxTxHxK, memory, metrics = self_modifying.update(
    params["memory"],
    state.memory,
    z["q"],
    z.get("k", sliced),
    z.get("v", sliced),
    config=config,
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
  model: "lm.LanguageModel",
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
  params: types.Params, model: "lm.LanguageModel"
) -> dict[str, types.Params]:
  """As `titans.starts`."""
  made = {"memory/memory": params["memory"]["memory"]}
  if model.mixer.generator_roles:
    laid = self_modifying.lay(params["memory"], model.mixer)
    made["memory/generators"] = laid
  return made


def alignment(model: "lm.LanguageModel") -> int:
  """Both chunk lengths divide it: documents begin at chunk edges."""
  return math.lcm(model.mixer.chunk_memory, model.mixer.chunk_gen)


def _memory_size(model: "lm.LanguageModel") -> int:
  """Parameters of one memory of one head."""
  config, K = model.mixer, model.head_dim
  if config.memory == "linear":
    return K * K
  return (3 if config.memory == "glu" else 2) * K * (config.hidden or K)


def parameter_count(model: "lm.LanguageModel") -> int:
  """5 D² + 12 D + R H 2KM + 2 H (K+1) + K (+ H with momentum), one layer."""
  config, H, K = model.mixer, model.heads, model.head_dim
  inner, D = H * K, model.width
  projected = len(_projected(model))
  count = (projected + 2) * D * inner + projected * layers.CONV_WIDTH * inner
  roles = len(config.generator_roles) + 1
  count += roles * H * _memory_size(model) + K
  if config.gate_source == "static":
    count += 2 * H * (D + 1)
  else:
    biases = K if config.gate_shape == "channel" else 1
    count += 2 * H * (K + biases)
  return count + H * (config.momentum != "off")


def _rule(model: "lm.LanguageModel") -> str:
  config = model.mixer
  name = "GD" if config.dgd_scope == "none" else f"DGD ({config.dgd_coef})"
  extra = f" + {config.momentum} momentum" if config.momentum != "off" else ""
  return name + extra + (", retention" if config.alpha_bias else "")


def rows(model: "lm.LanguageModel") -> list[card.Row]:
  """The generators (the "projections" of Fig. 3) and M_memory."""
  config = model.mixer
  params = jax.eval_shape(lambda key: init(key, model), jax.random.key(0))
  state = jax.eval_shape(lambda p: init_state(p, 1, 0, model=model), params)
  size = lambda tree: (
    model.layers
    * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  )
  memory = model.heads * _memory_size(model) * model.layers
  shared = dict(
    kind="memory",
    bptt=1 if config.stop_grad_writes else None,
    rule=_rule(model),
    transfer="init",
  )
  made = card.Row(
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
    card.Row(
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
