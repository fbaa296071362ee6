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
import itertools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import fields, memory, types
from nl_jax.fields import Whole
from nl_jax.levels import LevelRow
from nl_jax.memory import rule as rules
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract


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


def _deep(model: contract.Dims) -> bool:
  return model.arch == "ttt_mlp"


def _shapes(model: contract.Dims) -> dict[str, tuple[int, int]]:
  """(in, out) of the memory's layers, without biases, by suffix."""
  K = model.head_dim
  M = model.mixer.hidden or 4 * K
  return {"_in": (K, M), "_out": (M, K)} if _deep(model) else {"": (K, K)}


def check(model: contract.Dims) -> None:
  """Raises ValueError for heads that do not fit, or hidden units of none."""
  contract.check_heads(model, even=True)
  if model.mixer.hidden and not _deep(model):
    raise ValueError(
      "model.arch='ttt_linear' has no hidden units, got model.mixer.hidden="
      f"{model.mixer.hidden}: set it to 0, or use model.arch='ttt_mlp'"
    )


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer.

  w_qk, w_v, w_g (D,HK), w_o (HK,D), conv_q, conv_k (4,HK), b_q, b_k (HK,), w_lr
  (D,H), b_lr (H,), token_rate (C,), memory {w (H,K,K), b_w (H,K)} or {w_in,
  b_in, w_out, b_out}, memory_norm {scale, bias (H,K)}, norm {scale, bias
  (HK,)}; with `pre_conv` pre_norm {scale (D,)}, conv_pre (4,D) and b_pre (D,).
  """
  D, H, K, pre = model.width, model.heads, model.head_dim, model.mixer.pre_conv
  key = itertools.count()
  made = {
    f"w_{n}": leaf.kernel((D, D), leaf.IN, next(key)) for n in ("qk", "v", "g")
  }
  std = layers.residual_std(model.layers)
  made["w_o"] = leaf.kernel((D, D), leaf.OUT, next(key), std)
  for name in ("q", "k", "pre") if pre else ("q", "k"):
    axis = "act_embed" if name == "pre" else "heads"
    made[f"conv_{name}"] = leaf.conv(D, next(key), axis)
    made[f"b_{name}"] = leaf.constant((D,), (axis,))
  made["w_lr"] = leaf.kernel((D, H), leaf.IN, next(key))
  made["b_lr"] = leaf.constant((H,), ("heads",))
  made["token_rate"] = leaf.constant((model.mixer.chunk,), ("chunk",))
  if pre:
    made["pre_norm/scale"] = leaf.scale(D, "act_embed")
  for suffix, (a, b) in _shapes(model).items():
    axes = ("heads", "start_in", "mem_out")
    made[f"memory/w{suffix}"] = leaf.kernel((H, a, b), axes, next(key))
    bias = leaf.constant((H, b), ("heads", "mem_out"))
    made[f"memory/{_bias(f'w{suffix}')}"] = bias
  for name, start in ("scale", 1.0), ("bias", 0.0):
    of_head = ("heads", "head_dim")
    made[f"memory_norm/{name}"] = leaf.constant((H, K), of_head, start)
  made["norm/scale"] = leaf.scale(D)
  return made | {"norm/bias": leaf.constant((D,), ("act_embed",))}


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
    layer: memory.rule.Layer, z: types.Array, slow: types.Params
  ) -> types.Array:
    if deep:
      y = jax.nn.gelu(layer("w_in", _with_one(z)))
      y = layer("w_out", _with_one(y))
    else:
      y = layer("w", _with_one(z))
    return layers.layer_norm(y, slow["scale"], slow["bias"])

  return run


def residual(
  params: types.Params,
  x_BxTxD: types.Array,
  state: TTTState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
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
  model: contract.Dims,
) -> tuple[types.Array, TTTState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer; of `convs` it moves "qk" alone.

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
  options, fresh = model.mixer, state is None
  window = None if state is None else state.convs["qk"]
  if state is None:
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
  params: types.Params, x_BxTxD: types.Array, model: contract.Dims
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
  model: contract.Dims,
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
  params: types.Params, model: contract.Dims
) -> dict[str, types.Params]:
  """The learned start of the memory, biases included."""
  del model
  return {"memory": _start(params)}


def alignment(model: contract.Dims) -> int:
  """The mini-batch: documents begin at its edges."""
  return model.mixer.chunk


def levels(model: contract.Dims) -> list[LevelRow]:
  """The memory; its start is learned."""
  options = model.mixer
  return [
    LevelRow(
      name="TTT-MLP" if _deep(model) else "TTT-Linear",
      kind="memory",
      chunk=options.chunk,
      bptt=1 if options.stop_grad_writes else None,
      objective="l2 after layer norm",
      rule="GD by mini-batches",
      transfer="init",
      state_bytes=contract.state_bytes(leaves(model), init_state, model),
      parameters=model.layers * leaf.count(leaves(model), "memory"),
    )
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer; biases are one more input of each layer."""
  del tokens
  D, H = model.width, model.heads
  shapes = {f"w{n}": (a + 1, b) for n, (a, b) in _shapes(model).items()}
  one = counting.chunked(shapes, model.mixer.rule, normed=True)
  return counting.Flops(projections=8.0 * D * D + 2.0 * D * H, memories=H * one)


LAYERS, WHOLE = 1, None
grows = contract.bounded
