"""TTT: a memory trained at test time by mini-batches (arXiv 2407.04620).

    x <- x + conv4(RMSNorm(x))                                    (pre_conv)
    z = x W_qk;  q, k = RoPE(conv4(z));  v = x W_v                heads of K
    f(q) = q w + b,  or  gelu(q w_in + b_in) w_out + b_out
    l = |LN(f(k)) - (v - k)|^2 / 2,  at the start of the mini-batch
    W_t = W_start - tok_t sum_{s <= t} eta_s grad_s l
    out = (LayerNorm(q + LN(f_t(q))) * gelu(x W_g)) W_o

with eta = base_lr sigmoid(x w_lr + b_lr) / K and tok_t = max(0, learned_t +
1/t), t = 1 ... C, a factor of the row t and not of the source s: it is `row`
of `memory.chunked.update`. Biases are the weights of a constant input; the
layer norm inside the objective is a slow weight (docs/mathematics.md 6).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import card, fields, memory, types
from nl_jax.fields import Whole
from nl_jax.memory import rule as rules
from nl_jax.models import layers

if TYPE_CHECKING:
  from nl_jax.models import lm


@dataclasses.dataclass(frozen=True)
class Options:
  """The switches of both forms; the form itself is the arch.

  Attributes:
    hidden: M, hidden units of "ttt_mlp"; 0: 4 K. "ttt_linear" has none.
    chunk: tokens of a mini-batch; RoPE's positions restart with each.
    base_lr: the inner learning rate before its gates; not warmed up.
    pre_conv: x + conv4(RMSNorm(x)) stands before the mixer.
    remat_group: mini-batches between states that the backward pass keeps; 1 is
      fastest.
    stop_grad_writes: the outer gradient does not pass earlier writes.
    walk: what runs the walk over chunks: "auto" (the kernels on a TPU where
      they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  hidden: Annotated[int, Whole(0)] = 0
  chunk: rules.Count = 16
  # Deviation from ttt-lm ("ttt_mlp": 0.1, warmed up from 0.01 with the outer
  # learning rate): constant, since a model here does not know the step.
  base_lr: Annotated[float, fields.POSITIVE] = 1.0
  pre_conv: bool = True
  remat_group: rules.Count = 4
  stop_grad_writes: bool = False
  walk: rules.Walk = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))

  @property
  def rule(self) -> memory.Rule:
    """Gradient descent, from the start of each mini-batch."""
    return memory.Rule(
      chunk=self.chunk,
      dgd_scope="none",
      retention_target="zero",
      erase_of="whole",
      remat_group=self.remat_group,
      stop_grad_writes=self.stop_grad_writes,
    )


class TTTState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: windows "qk" of the shared projection and, with `pre_conv`, "pre".
    memory: fast weights with their biases as last rows, and their clocks.
  """

  convs: dict[str, layers.ConvState]
  memory: memory.MemoryState


def _deep(model: "lm.LanguageModel") -> bool:
  return model.arch == "ttt_mlp"


def _shapes(model: "lm.LanguageModel") -> dict[str, tuple[int, int]]:
  """(in, out) of the memory's layers, without biases, by suffix."""
  K = model.head_dim
  M = model.mixer.hidden or 4 * K
  return {"_in": (K, M), "_out": (M, K)} if _deep(model) else {"": (K, K)}


def check(model: "lm.LanguageModel") -> None:
  """Raises ValueError for heads that do not fit, or hidden units of none."""
  layers.check_heads(model, even=True)
  if model.mixer.hidden and not _deep(model):
    raise ValueError(
      "model.arch='ttt_linear' has no hidden units, got model.mixer.hidden="
      f"{model.mixer.hidden}: set it to 0, or use model.arch='ttt_mlp'"
    )


def init(key: types.Array, model: "lm.LanguageModel") -> types.Params:
  """Parameters of one layer.

  Returns:
    w_qk, w_v, w_g (D,HK), w_o (HK,D), conv_q, conv_k (4,HK), b_q, b_k (HK,),
    w_lr (D,H), b_lr (H,), token_rate (C,), memory {w (H,K,K), b_w (H,K)} or
    {w_in, b_in, w_out, b_out}, memory_norm {scale, bias (H,K)}, norm {scale,
    bias (HK,)}; with `pre_conv` pre_norm {scale (D,)}, conv_pre (4,D) and
    b_pre (D,).
  """
  options, D = model.mixer, model.width
  keys = iter(jax.random.split(key, 12))
  params = {f"w_{n}": layers.normal(next(keys), (D, D)) for n in ("qk", "v")}
  params["w_g"] = layers.normal(next(keys), (D, D))
  std = layers.residual_std(model.layers)
  params["w_o"] = layers.normal(next(keys), (D, D), std)
  for name in ("q", "k", "pre") if options.pre_conv else ("q", "k"):
    params[f"conv_{name}"] = layers.conv_init(next(keys), D)
    params[f"b_{name}"] = jnp.zeros((D,))
  params["w_lr"] = layers.normal(next(keys), (D, model.heads))
  params["b_lr"] = jnp.zeros((model.heads,))
  params["token_rate"] = jnp.zeros((options.chunk,))
  if options.pre_conv:
    params["pre_norm"] = {"scale": jnp.ones((D,))}
  params["memory"] = {}
  for suffix, shape in _shapes(model).items():
    start = layers.normal(next(keys), (model.heads, *shape))
    params["memory"][f"w{suffix}"] = start
    bias = jnp.zeros((model.heads, shape[1]))
    params["memory"][_bias(f"w{suffix}")] = bias
  affine = lambda *shape: {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}
  params["memory_norm"] = affine(model.heads, model.head_dim)
  params["norm"] = affine(D)
  return params


def _bias(layer: str) -> str:
  """The parameter of a layer's bias: b_w, b_in, b_out."""
  return "b_" + layer.removeprefix("w_")


def _start(params: types.Params) -> types.Params:
  """The learned start, biases as the weights of a last input that is 1."""
  made = {}
  for name, w in params["memory"].items():
    if name.startswith("w"):
      b = params["memory"][_bias(name)]
      made[name] = jnp.concatenate([w, b[:, None]], axis=1)
  return made


def _with_one(x: types.Array) -> types.Array:
  return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def forward(deep: bool) -> Callable[..., types.Array]:
  """LN(f(z)), z [...,C,K]; slow: scale and bias [...,1,K]."""

  def run(
    apply: memory.rule.Apply, z: types.Array, slow: types.Params
  ) -> types.Array:
    if deep:
      y = jax.nn.gelu(apply("w_in", _with_one(z)))
      y = apply("w_out", _with_one(y))
    else:
      y = apply("w", _with_one(z))
    return layers.layer_norm(y, slow["scale"], slow["bias"])

  return run


def residual(
  params: types.Params,
  x_BxTxD: types.Array,
  state: TTTState | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
) -> tuple[types.Array, TTTState, dict[str, memory.Metrics]]:
  """The first half of a block: x + conv4(RMSNorm(x)), then the mixer.

  Args:
    params: mixer_norm and mixer of one layer.
    x_BxTxD: the residual stream.
    state, segment_ids, model: as `apply`.
  """
  mixer, convs = params["mixer"], {}
  if model.mixer.pre_conv:
    y_BxTxD, convs["pre"] = layers.conv_apply(
      mixer["conv_pre"],
      layers.rms_norm(x_BxTxD, mixer["pre_norm"]["scale"], model.norm_epsilon),
      None if state is None else state.convs["pre"],
      segment_ids,
    )
    x_BxTxD = x_BxTxD + y_BxTxD + _vector(mixer["b_pre"], x_BxTxD)
  normed = layers.rms_norm(
    x_BxTxD, params["mixer_norm"]["scale"], model.norm_epsilon
  )
  y_BxTxD, state, metrics = apply(
    mixer, normed, state, segment_ids, model=model
  )
  return x_BxTxD + y_BxTxD, state._replace(convs=state.convs | convs), metrics


def _vector(b: types.Array, like: types.Array) -> types.Array:
  return b.astype(like.dtype)[None, None]


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: TTTState | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
) -> tuple[types.Array, TTTState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer; of `convs` it moves "qk" alone.

  Args:
    params: of `init`.
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
  options, fresh = model.mixer, state is None
  window = None if fresh else state.convs["qk"]
  if fresh:
    state = init_state(params, x_BxTxD.shape[0], 0, model=model)
  heads = (*x_BxTxD.shape[:2], model.heads, model.head_dim)
  places_BxT = memory.chunked.places(
    state.memory, segment_ids, heads[1], options.chunk
  )
  projected = layers.dense(x_BxTxD, params["w_qk"])
  made = {}
  for name in ("q", "k"):
    y, after = layers.conv_apply(
      params[f"conv_{name}"], projected, window, segment_ids
    )
    y = (y + _vector(params[f"b_{name}"], y)).reshape(heads)
    y = y.astype(layers.at_least_float32(y.dtype))
    made[name] = layers.rope(y, places_BxT)
  v_BxTxHxK = layers.dense(x_BxTxD, params["w_v"]).reshape(heads)
  affine = {n: g[:, None] for n, g in params["memory_norm"].items()}
  y_BxTxHxK, fast, metrics = memory.chunked.update(
    forward(_deep(model)),
    _start(params),
    state.memory,
    made["q"],
    made["k"],
    v_BxTxHxK - made["k"],
    _gates(params, x_BxTxD, model),
    rule=options.rule,
    slow=affine,
    segment_ids=segment_ids,
    at_edge=fresh or model.at_edge,
    aligned=fresh or model.at_edge,
    row=_token_rates(params),
    run=layers.run(options.walk, dtype=x_BxTxD.dtype),
    name=model.arch,
  )
  y_BxTxHK = (made["q"] + y_BxTxHxK).reshape(x_BxTxD.shape)
  scale, bias = (params["norm"][n][None, None] for n in ("scale", "bias"))
  y_BxTxHK = layers.layer_norm(y_BxTxHK, scale, bias).astype(x_BxTxD.dtype)
  gate = jax.nn.gelu(layers.dense(x_BxTxD, params["w_g"]))
  out = layers.dense(y_BxTxHK * gate, params["w_o"])
  convs = state.convs | {"qk": after}
  return out, TTTState(convs, fast), {"memory": metrics}


def _gates(
  params: types.Params, x_BxTxD: types.Array, model: "lm.LanguageModel"
) -> memory.Gates:
  """eta without its token factor, [B,T,H], float32 at least; no retention."""
  wide = layers.at_least_float32(x_BxTxD.dtype)
  logit = layers.dense(x_BxTxD, params["w_lr"]).astype(wide)
  gate = jax.nn.sigmoid(logit + params["b_lr"].astype(wide)[None, None])
  eta = model.mixer.base_lr * gate / model.head_dim
  return memory.Gates(eta, jnp.zeros_like(eta))


def _token_rates(params: types.Params) -> types.Array:
  """tok_t = max(0, learned_t + 1/t), t = 1 ... C."""
  learned = params["token_rate"]
  t = jnp.arange(1, learned.shape[0] + 1, dtype=learned.dtype)
  return jnp.maximum(0.0, learned + 1.0 / t)


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: "lm.LanguageModel",
) -> TTTState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  del length
  dtype = layers.activation_dtype(model.dtype, params)
  window = layers.conv_state(batch_size, model.width, dtype)
  names = ("qk", "pre") if model.mixer.pre_conv else ("qk",)
  return TTTState(
    dict.fromkeys(names, window),
    memory.chunked.start(_start(params), batch_size, model.mixer.rule),
  )


def starts(
  params: types.Params, model: "lm.LanguageModel"
) -> dict[str, types.Params]:
  """As `titans.starts`."""
  del model
  return {"memory": _start(params)}


def alignment(model: "lm.LanguageModel") -> int:
  """The mini-batch: documents begin at its edges."""
  return model.mixer.chunk


def _memory_size(model: "lm.LanguageModel") -> int:
  """Parameters of the memories of one layer's heads, biases included."""
  return model.heads * sum((a + 1) * b for a, b in _shapes(model).values())


def parameter_count(model: "lm.LanguageModel") -> int:
  """4 D² + 14 D + C + H (D+1) + memories (+ 6 D with pre_conv), one layer.

  Memories: H (K² + K), or H (8 K² + 5 K) at M = 4 K.
  """
  D, options = model.width, model.mixer
  count = 4 * D * D + 2 * (layers.CONV_WIDTH + 1) * D + 4 * D
  count += options.chunk + model.heads * (D + 1) + _memory_size(model)
  return count + (layers.CONV_WIDTH + 2) * D * options.pre_conv


def rows(model: "lm.LanguageModel") -> list[card.Row]:
  """The memory; its start is learned."""
  options = model.mixer
  return [
    card.Row(
      name="TTT-MLP" if _deep(model) else "TTT-Linear",
      kind="memory",
      chunk=options.chunk,
      bptt=1 if options.stop_grad_writes else None,
      objective="l2 after layer norm",
      rule="GD by mini-batches",
      transfer="init",
      state_bytes=layers.size_of_state(model),
      parameters=model.layers * _memory_size(model),
    )
  ]
