"""RWKV-7: a matrix memory with a decay and a write rate for each channel.

    x_n = x + (x_{t-1} - x) mu_n                    for n in r, w, k, v, a, g
    r, k, v = x_r W_r, x_k W_k, x_v W_v;   a = sigmoid(LoRA(x_a))
    w = -e^{-1/2} sigmoid(LoRA_tanh(x_w));   g = LoRA_sigmoid(x_g)
    v <- v + (v_first - v) sigmoid(LoRA(x_v))       in layers but the first
    kappa = l2norm(k k_k);   k <- k (1 + (a - 1) k_a)
    S <- diag(e^w) S - (kappa a)^T (kappa S) + k^T v
    out = ((GroupNorm_h(r S) + (sum_K r k r_k) v) * g) W_o
    feed-forward: relu((x + (x_{t-1} - x) mu) W_up)^2 W_down

RWKV-7, arXiv 2503.14456 (docs/mathematics.md 6). In the words of Nested
Learning a linear memory with the objective -<k S, v>, delta gradient descent on
a state that has not decayed yet, as in eq. 88, and a rate and a retention of
their own for each key channel. v_first are the values of the first layer, which
all above it see: with them, and with a feed-forward part that looks one token
back, a layer here is more than a mixer, and the language model takes it whole.
"""

# Deviation: RMSNorm before each half of a layer in place of LayerNorm, and no
# norm after the embedding, because all rows of Table 1 share these parts
# (docs/mathematics.md 6, 7.2).

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import card, fields, types
from nl_jax.fields import Whole
from nl_jax.kernels import general_delta_rule as ops
from nl_jax.kernels.rank_one import segments
from nl_jax.memory import rule
from nl_jax.models import cms, layers

if TYPE_CHECKING:
  from nl_jax.models import lm

WHOLE = True  # A layer with its feed-forward part, not a mixer alone.
_SHIFTED = ("r", "w", "k", "v", "a", "g")
_PROJECTED = ("r", "k", "v")
_RANKS = ("decay", "rate", "value", "gate")  # LoRA of w, a, v and g.
_SLOWEST = math.exp(-0.5)  # -w at most, so that e^w > 0.54.
_MAX_CHUNK = 64  # e^{0.61 C} in float32, with room for small factors.
_EPSILON = 1e-5  # Of the group norm, times K.


@dataclasses.dataclass(frozen=True)
class Options:
  """The switches.

  Attributes:
    decay_rank: inner width of the LoRA of the decays w.
    rate_rank: inner width of that of the rates a.
    value_rank: inner width of that of the share of the first layer's values.
    gate_rank: inner width of that of the output gate g.
    chunk: tokens computed at once; changes no number. Beyond 64 decays leave
      float32.
    remat_group: chunks between states kept for the backward pass; 1 is fastest.
    walk: what runs the walk over chunks: "auto" (the kernels on a TPU where
      they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  decay_rank: rule.Count = 64
  rate_rank: rule.Count = 64
  value_rank: rule.Count = 32
  gate_rank: rule.Count = 128
  chunk: Annotated[int, Whole(1, _MAX_CHUNK)] = 64
  remat_group: rule.Count = 4
  walk: rule.Walk = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))


class RWKV7State(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"mix", "ffn"}: the last tokens before each half.
    S_BxHxKxK: float32 at least.
  """

  convs: dict[str, layers.ConvState]
  S_BxHxKxK: types.Array


class Stream(NamedTuple):
  """What goes up the layers.

  Attributes:
    x_BxTxD: the residual stream.
    values_BxTxD: v_first; 0 before the first layer.
  """

  x_BxTxD: types.Array
  values_BxTxD: types.Array


def enter(x_BxTxD: types.Array) -> Stream:
  """The stream before the first layer."""
  return Stream(x_BxTxD, jnp.zeros_like(x_BxTxD))


def leave(stream: Stream) -> types.Array:
  """The residual stream after the last layer."""
  return stream.x_BxTxD


def check(model: "lm.LanguageModel") -> None:
  """Raises ValueError for heads, layers or levels that cannot be."""
  layers.check_heads(model)
  if model.layers < 2:
    raise ValueError(
      "model.layers must be at least 2 for model.arch='rwkv7', whose first "
      f"layer gives its values to the others, got {model.layers}"
    )
  plain = cms.CMSConfig(model.cms.levels[:1], model.cms.widths[:1], (0,))
  if model.cms != plain:
    raise ValueError(
      "model.arch='rwkv7' has one feed-forward part, of its own form: "
      "model.cms must have one level of period 0, variant 'sequential', norm "
      f"and residual, got {model.cms}"
    )


def init(key: types.Array, model: "lm.LanguageModel") -> types.Params:
  """Parameters of one layer, but for its mixer_norm.

  Returns:
    mu_r ... mu_g (D,), w_r, w_k, w_v, w_o (D,D), <name>_down (D,R),
    <name>_up (R,D) of decay, rate, value and gate, <name>_bias (D,) of the
    first three, key_scale, key_rate, bonus (D,): k_k, k_a and r_k, norm
    {scale, bias (D,)}, and cms {level: {norm {scale (D,)}, mu (D,), w_up
    (D,F), w_down (F,D)}}. What depends on the layer is set by `finish`.
  """
  D, options = model.width, model.mixer
  keys = iter(jax.random.split(key, 8))
  uniform = lambda shape, scale: jax.random.uniform(
    next(keys), shape, jnp.float32, -scale * D**-0.5, scale * D**-0.5
  )
  params = {f"mu_{n}": jnp.zeros((D,)) for n in _SHIFTED}
  for name, scale in zip(_PROJECTED, (0.5, 0.05, 0.5)):
    params[f"w_{name}"] = uniform((D, D), scale)
  params["w_o"] = jnp.zeros((D, D))
  orthogonal = jax.nn.initializers.orthogonal(0.1)
  for name in _RANKS:
    rank = getattr(options, f"{name}_rank")
    params[f"{name}_down"] = jnp.zeros((D, rank))
    params[f"{name}_up"] = orthogonal(next(keys), (rank, D))
  spread, waves = _places(model)
  params |= {
    "decay_bias": jnp.zeros((D,)),
    "rate_bias": -0.19 + 0.3 * waves + 0.4 * spread,
    "value_bias": 0.73 - 0.4 * spread,
    "key_scale": 0.71 - 0.1 * spread,
    "key_rate": jnp.full((D,), 1.02),
    "bonus": jnp.full((D,), -0.04),
    "norm": {"scale": jnp.ones((D,)), "bias": jnp.zeros((D,))},
  }
  F = model.cms.widths[0]
  level = {
    "norm": {"scale": jnp.ones((D,))},
    "mu": jnp.zeros((D,)),
    "w_up": uniform((D, F), 0.5),
    "w_down": jnp.zeros((F, D)),
  }
  return params | {"cms": {model.cms.levels[0]: level}}


def _places(model: "lm.LanguageModel") -> tuple[types.Array, types.Array]:
  """[D] channels from -1/2 to 1/2; signed squares along each head, -1 to 1."""
  D, K = model.width, model.head_dim
  spread = jnp.arange(D) / (D - 1) - 0.5
  half = max((K - 1) / 2, 0.5)
  along = (jnp.arange(D) % K - (K - 1) / 2) / half
  return spread, along * jnp.abs(along)


def finish(blocks: types.Params, model: "lm.LanguageModel") -> types.Params:
  """The start of all layers, as the authors' code has it (RWKV-LM).

  Args:
    blocks: leaves [L,...].
    model: shapes.

  Returns:
    The same with what depends on the layer, and without value_* of the first
    layer, leaves [L-1,...]: its own values are those that the others see.
  """
  D, L = model.width, model.layers
  layer = jnp.arange(L, dtype=jnp.float32)[:, None]
  up, down = layer / (L - 1), 1 - layer / L
  at = jnp.arange(D, dtype=jnp.float32)[None] / D
  mixer = dict(blocks["mixer"])
  for name, power in zip(_SHIFTED, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
    mixer[f"mu_{name}"] = 1 - at ** (power * down)
  _, waves = _places(model)
  rising = (jnp.arange(D) / (D - 1))[None] ** (1 + up**0.3)
  mixer["decay_bias"] = 6 * rising - 5.5 + 2.5 * waves[None]
  scale = jnp.broadcast_to(((layer + 1) / L) ** 0.7, (L, D))
  mixer["norm"] = mixer["norm"] | {"scale": scale}
  ((level, ffn),) = mixer["cms"].items()
  mixer["cms"] = {level: ffn | {"mu": 1 - at ** (down**4)}}
  values = {n: mixer[n][1:] for n in mixer if n.startswith("value_")}
  return {**blocks, "mixer": mixer | values}


def laid(blocks: types.Params) -> types.Params:
  """The blocks with leaves [L,...] all, and `first`, True for one layer."""
  mixer = dict(blocks["mixer"])
  for name in mixer:
    if name.startswith("value_"):
      mixer[name] = jnp.pad(
        mixer[name], [(1, 0)] + [(0, 0)] * (mixer[name].ndim - 1)
      )
  mixer["first"] = jnp.arange(len(mixer["w_o"])) == 0
  return {**blocks, "mixer": mixer}


def residual(
  params: types.Params,
  stream: Stream,
  state: RWKV7State | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
) -> tuple[Stream, RWKV7State, dict]:
  """One layer, its feed-forward part included.

  Args:
    params: of one layer: mixer_norm, and mixer with `first`.
    stream: what the layer below gives.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    The stream, the state after the call, and no metrics.
  """
  x_BxTxD, values_BxTxD = stream
  mixer = params["mixer"]
  windows = dict(mix=None, ffn=None) if state is None else state.convs
  normed = layers.rms_norm(
    x_BxTxD, params["mixer_norm"]["scale"], model.norm_epsilon
  )
  before, mixed = _shift(normed, windows["mix"], segment_ids)
  projected = _project(mixer, normed, before, values_BxTxD)
  y_BxTxD, S_BxHxKxK = _remember(
    mixer, projected, state, segment_ids, model=model
  )
  x_BxTxD = x_BxTxD + y_BxTxD
  (ffn,) = mixer["cms"].values()
  normed = layers.rms_norm(x_BxTxD, ffn["norm"]["scale"], model.norm_epsilon)
  before, window = _shift(normed, windows["ffn"], segment_ids)
  hidden = layers.dense(_lerp(normed, before, ffn["mu"]), ffn["w_up"])
  hidden = jnp.square(jax.nn.relu(hidden))
  x_BxTxD = x_BxTxD + layers.dense(hidden, ffn["w_down"])
  convs = {"mix": mixed, "ffn": window}
  values_BxTxD = jnp.where(mixer["first"], projected["v"], values_BxTxD)
  return Stream(x_BxTxD, values_BxTxD), RWKV7State(convs, S_BxHxKxK), {}


def _shift(
  x_BxTxD: types.Array,
  window: layers.ConvState | None,
  segment_ids: types.Array | None,
) -> tuple[types.Array, layers.ConvState]:
  """The token before each, 0 before a document; a convolution of one tap."""
  taps = jnp.zeros((layers.CONV_WIDTH, x_BxTxD.shape[-1])).at[-2].set(1.0)
  return layers.conv_apply(taps, x_BxTxD, window, segment_ids)


def _lerp(x: types.Array, y: types.Array, mu: types.Array) -> types.Array:
  """x + (y - x) mu."""
  mu = mu.astype(x.dtype)
  return x + (y - x) * (mu[None, None] if mu.ndim == 1 else mu)


def _project(
  params: types.Params,
  x_BxTxD: types.Array,
  before_BxTxD: types.Array,
  values_BxTxD: types.Array,
) -> dict[str, types.Array]:
  """r, k, v, g in x's dtype, log decay w and rate a in float32, [B,T,D]."""
  wide = layers.at_least_float32(x_BxTxD.dtype)
  x = {n: _lerp(x_BxTxD, before_BxTxD, params[f"mu_{n}"]) for n in _SHIFTED}

  def lora(name: str, x: types.Array, inner=lambda z: z) -> types.Array:
    z = inner(layers.dense(x, params[f"{name}_down"]))
    z = layers.dense(z, params[f"{name}_up"])
    bias = params.get(f"{name}_bias")
    return z if bias is None else z.astype(wide) + bias.astype(wide)[None, None]

  made = {n: layers.dense(x[n], params[f"w_{n}"]) for n in _PROJECTED}
  share = jax.nn.sigmoid(lora("value", x["v"]))
  mixed = _lerp(made["v"], values_BxTxD, share)
  made["v"] = jnp.where(params["first"], made["v"], mixed)
  made["a"] = jax.nn.sigmoid(lora("rate", x["a"]))
  made["w"] = -_SLOWEST * jax.nn.sigmoid(lora("decay", x["w"], jnp.tanh))
  made["g"] = lora("gate", x["g"], jax.nn.sigmoid)
  return made


def _remember(
  params: types.Params,
  projected: dict[str, types.Array],
  state: RWKV7State | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
) -> tuple[types.Array, types.Array]:
  """What a layer adds to the stream, and the memory after the call."""
  z, dtype = projected, projected["r"].dtype
  wide = layers.at_least_float32(dtype)
  batch, tokens, D = z["r"].shape
  vector = lambda name: params[name].astype(wide)[None, None]
  heads = lambda x: x.astype(wide).reshape(batch, tokens, model.heads, -1)
  r, v, w, rate = (heads(z[n]) for n in ("r", "v", "w", "a"))
  kappa = layers.l2_norm(heads(z["k"] * vector("key_scale")))
  k = heads(z["k"] * (1 + (z["a"] - 1) * vector("key_rate")))
  write = kappa * rate
  begins = None
  S = jnp.zeros((batch, model.heads, *2 * (model.head_dim,)), wide)
  if state is not None:
    S = state.S_BxHxKxK
  if segment_ids is not None:
    real = (segment_ids > 0)[..., None, None]
    w, write, k_in = (jnp.where(real, x, 0.0) for x in (w, write, k))
    before = 0 * segment_ids[:, 0]
    if state is not None:
      before = state.convs["mix"].segment_Bx3[:, -1]
    index = segments.running_index(segment_ids, before)
    begins = jnp.diff(index, axis=1, prepend=0) > 0
  else:
    k_in = k
  # As they are: a walk reads half as much, and knows the model's precision.
  narrow = lambda x: x.reshape(k.shape)
  run = layers.run(model.mixer.walk)
  y_BxTxHxK, S = ops.general_delta_rule(
    narrow(z["r"]), k_in, narrow(z["v"]), w, (kappa, write), S, begins,
    chunk=model.mixer.chunk, remat_group=model.mixer.remat_group,
    implementation=run.implementation, spec=run.spec,
  )  # fmt: skip
  y_BxTxD = _group_norm(y_BxTxHxK, params["norm"])
  bonus = vector("bonus").reshape(1, 1, model.heads, -1)
  own = jnp.sum(r * k * bonus, axis=-1, keepdims=True)
  y_BxTxD = y_BxTxD + (own * v).reshape(batch, tokens, D)
  y_BxTxD = y_BxTxD.astype(dtype) * z["g"]
  return layers.dense(y_BxTxD, params["w_o"]), S


def _group_norm(y_BxTxHxK: types.Array, norm: types.Params) -> types.Array:
  """[B,T,HK]: each head to mean 0 and variance 1, then scale and bias."""
  batch, tokens, _, K = y_BxTxHxK.shape
  y = y_BxTxHxK - y_BxTxHxK.mean(axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(variance + _EPSILON * K)
  scale, bias = (norm[n].astype(y.dtype)[None, None] for n in ("scale", "bias"))
  return y.reshape(batch, tokens, -1) * scale + bias


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: "lm.LanguageModel",
) -> RWKV7State:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  dtype = layers.activation_dtype(model.dtype, params)
  window = layers.conv_state(batch_size, model.width, dtype)
  shape = (batch_size, model.heads, model.head_dim, model.head_dim)
  wide = jnp.result_type(params["w_r"], jnp.float32)
  return RWKV7State({"mix": window, "ffn": window}, jnp.zeros(shape, wide))


def alignment(model: "lm.LanguageModel") -> int:
  """1: documents may begin at any token."""
  del model
  return 1


def _rank_total(options: Options) -> int:
  return sum(getattr(options, f"{name}_rank") for name in _RANKS)


def parameter_count(model: "lm.LanguageModel") -> int:
  """4 D² + 2 D R + 14 D of a mixer, 2 D F + 2 D of a feed-forward part.

  R is the sum of the four ranks; see `absent`.
  """
  D, F = model.width, model.cms.widths[0]
  mixer = 4 * D * D + 2 * D * _rank_total(model.mixer) + 14 * D
  return mixer + 2 * D * F + 2 * D


def absent(model: "lm.LanguageModel") -> int:
  """2 D R_v + D: the first layer has no LoRA of values."""
  return model.width * (2 * model.mixer.value_rank + 1)


def rows(model: "lm.LanguageModel") -> list[card.Row]:
  """The matrix memory; it has no parameters of its own."""
  return [
    card.Row(
      name="RWKV-7",
      kind="memory",
      chunk=1,
      bptt=None,
      objective="dot",
      rule="DGD (delta rule), retention",
      transfer="parametric",
      state_bytes=layers.size_of_state(model),
    )
  ]
