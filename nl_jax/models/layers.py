"""Parts shared by all architectures: norm, SwiGLU, RoPE, short convolution.

Functions on arrays, and a thin Linen module that owns the scale of a norm.
Layout: kernels are (d_in, d_out), `y = x @ w`; no biases.
Reductions run in float32 at least, products in the dtype of the activations.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import fields, memory, sharding, types
from nl_jax.fields import Number, OneOf, Whole
from nl_jax.kernels import walk as kernels
from nl_jax.kernels.rank_one import segments

INIT_STD = 0.02  # docs/mathematics.md 5: kernels and embedding.
EPSILON = 1e-6  # Of every norm, unless a model says another.
ROPE_THETA = 10000.0  # Base of RoPE's wave lengths (docs/mathematics.md 6).
ROPE_SCALINGS = ("none", "linear", "llama3")
CONV_WIDTH = 4  # Paper §8.2: "local convolutions with window 4".


def run(
  walk: str,
  *,
  by_token: bool = False,
  rate: float = 1.0,
  dtype: jnp.dtype | None = None,
) -> memory.Run:
  """How a mixer's walk over chunks runs (see `nl_jax.kernels.walk`).

  Args:
    walk: of `WALKS`; "auto": the kernels on a TPU where they can.
    by_token: one token after the other, the definition.
    rate: the largest rate at which a token erases.
    dtype: of the activations, where the walk's inputs are of another.
  """
  policy = None if dtype is None else kernels.default_policy(dtype, rate).name
  implementation = None if walk == "auto" else walk
  spec = sharding.spec("batch", "length", "heads")
  form = "reference" if by_token else implementation
  return memory.Run(form, spec, rate, policy)


def residual_std(layers: int) -> float:
  """Start of kernels that write to the residual stream: 0.02 / sqrt(2 L)."""
  return INIT_STD / (2 * layers) ** 0.5


def normal(
  key: types.Array, shape: tuple[int, ...], std: float = INIT_STD
) -> types.Array:
  """A float32 kernel drawn from N(0, std²)."""
  return std * jax.random.normal(key, shape, jnp.float32)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
  """float32, or float64 where the input already is."""
  return jnp.promote_types(dtype, jnp.float32)


def activation_dtype(name: str, params: types.Params) -> jnp.dtype:
  """Dtype of activations: `name`; "float32" goes up to float64 parameters'."""
  if name != "float32":
    return jnp.dtype(name)
  return jnp.result_type(*jax.tree.leaves(params), jnp.float32)


def dense(x: types.Array, w: types.Array) -> types.Array:
  """`x @ w` over the last axis, in the dtype of x; w is (d_in, d_out)."""
  return x @ w.astype(x.dtype)


def rms_norm(
  x: types.Array, scale: types.Array, epsilon: float = EPSILON
) -> types.Array:
  """x · rsqrt(mean x² + epsilon) · scale over the last axis, in x's dtype.

  Args:
    x: [..., E].
    scale: [E].
    epsilon: added to the mean square.
  """
  wide = x.astype(at_least_float32(x.dtype))
  mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean + epsilon)
  scale = jax.lax.broadcast_in_dim(
    scale.astype(wide.dtype), wide.shape, (wide.ndim - 1,)
  )
  return (normed * scale).astype(x.dtype)


def layer_norm(
  x: types.Array, scale: types.Array, bias: types.Array
) -> types.Array:
  """Layer norm over the last axis, in float32 at least.

  Args:
    x: [..., E].
    scale, bias: of the rank of x, broadcast against it.
  """
  wide = x.astype(at_least_float32(x.dtype))
  centred = wide - wide.mean(axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + EPSILON)
  return normed * scale.astype(wide.dtype) + bias.astype(wide.dtype)


def l2_norm(x: types.Array) -> types.Array:
  """x · rsqrt(Σ x² + 1e-6) over the last axis, in float32 at least."""
  wide = x.astype(at_least_float32(x.dtype))
  size = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
  return wide * jax.lax.rsqrt(size + EPSILON)


def gated(
  x: types.Array, w_gate: types.Array, w_up: types.Array
) -> types.Array:
  """SiLU(x w_gate) ∘ x w_up, the hidden units of SwiGLU; x [..., D]."""
  return jax.nn.silu(dense(x, w_gate)) * dense(x, w_up)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How the rates of RoPE are lowered for contexts beyond the trained length.

  Attributes:
    kind: "none"; "linear": every rate is divided by `factor`; "llama3": that
      of waves which fit fewer than `low` times into the trained length, none
      of those which fit `high` times, and those between in part.
    factor: at least 1.
    low, high: waves in the trained length, low < high.
    trained_length: tokens.
  """

  kind: Annotated[str, OneOf(*ROPE_SCALINGS)] = "none"
  factor: Annotated[float, Number(1.0)] = 1.0
  low: Annotated[float, fields.POSITIVE] = 1.0
  high: Annotated[float, fields.POSITIVE] = 4.0
  trained_length: Annotated[int, Whole(1)] = 8192

  def __post_init__(self):
    fields.check("model.mixer.rope_scaling", RopeScaling, vars(self))
    if not self.low < self.high:
      raise ValueError(
        "model.mixer.rope_scaling.low must be below high, got "
        f"{self.low} and {self.high}"
      )


_TURN = 2 * np.pi / 2.0**32  # What one unit of `rope_turns` is, in radians.


def rope_turns(
  half: int, theta: float, scaling: RopeScaling
) -> tuple[np.ndarray, np.ndarray]:
  """How far a token turns each pair of features: theta^(-i/half), scaled.

  Args:
    half: K/2.
    theta: base of the wave lengths.
    scaling: see `RopeScaling`.

  Returns:
    uint32 [half], of 2^-32 turns, and what rounding to them left, in radians.
  """
  rates = theta ** (-np.arange(half) / half)
  if scaling.kind == "linear":
    rates = rates / scaling.factor
  elif scaling.kind == "llama3":
    waves = scaling.trained_length * rates / (2 * np.pi)
    kept = (waves - scaling.low) / (scaling.high - scaling.low)
    kept = np.clip(kept, 0.0, 1.0)
    rates = kept * rates + (1 - kept) * rates / scaling.factor
  turns = np.rint(rates / _TURN)
  return turns.astype(np.uint32), rates - turns * _TURN


def rope(
  x_BxTxHxK: types.Array,
  positions_BxT: types.Array,
  theta: float = ROPE_THETA,
  scaling: RopeScaling = RopeScaling(),
) -> types.Array:
  """Rotary positions over the full head width (arXiv 2104.09864).

  Feature i < K/2 turns with feature i + K/2 by position · theta^(-2i/K), the
  pairing of Llama. Exact at any position: turns are counted in integers of 32
  bits, of which whole turns fall off. So 2^32 tokens turn nothing, a counter
  of positions may overflow, and two tokens stand to each other as their
  distance says, however long the text before them. Rates are rounded to these
  integers, to less than float32 knows of an angle; in float64 what that leaves
  is added, and 2^31 tokens are then the end.

  Args:
    x_BxTxHxK: queries or keys, K even.
    positions_BxT: int32, counted from the start of the document, modulo 2^32.
    theta: base of the wave lengths.
    scaling: of the rates.
  """
  half = x_BxTxHxK.shape[-1] // 2
  wide = at_least_float32(x_BxTxHxK.dtype)
  turns, left = rope_turns(half, theta, scaling)
  at = positions_BxT.astype(jnp.uint32)[:, :, None, None]
  turned = at * jnp.asarray(turns).reshape(1, 1, 1, half)
  # As a signed number, at most half a turn: what is small keeps all its bits.
  turned = jax.lax.bitcast_convert_type(turned, jnp.int32).astype(wide)
  angles = turned * _TURN
  if wide == jnp.float64:
    signed = jax.lax.bitcast_convert_type(at, jnp.int32).astype(wide)
    angles += signed * jnp.asarray(left, wide).reshape(1, 1, 1, half)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x_BxTxHxK.astype(wide), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BxTxHxK.dtype)


def positions(
  index_BxT: types.Array, real_BxT: types.Array, carried_B: types.Array
) -> tuple[types.Array, types.Array]:
  """Places of a call's tokens in their documents, and of the next token.

  Args:
    index_BxT: documents that began in the call, of `segments.running_index`.
    real_BxT: bool, no padding, which takes no place.
    carried_B: int32, tokens of the current document before the call.

  Returns:
    int32 [B,T] and [B], modulo 2^32, which is all that `rope` reads.
  """
  before = jnp.pad(index_BxT[:, :-1], [(0, 0), (1, 0)])
  rank = jnp.cumsum(real_BxT, axis=1, dtype=jnp.int32) - real_BxT
  start = jnp.where(index_BxT != before, rank, -1)
  start = jax.lax.cummax(start, axis=1)
  places = jnp.where(start < 0, carried_B[:, None] + rank, rank - start)
  return places, (places + real_BxT)[:, -1]


class ConvState(NamedTuple):
  """The window that a short convolution carries between calls.

  Attributes:
    inputs_Bx3xE: the last three real inputs of each row, oldest first.
    segment_Bx3: int32, their segment ids; 0 where there was no input, or one
      of an earlier document than the last.
  """

  inputs_Bx3xE: types.Array
  segment_Bx3: types.Array


def conv_init(key: types.Array, channels: int) -> types.Array:
  """Taps (4, E), uniform in ±1/2 (fan-in 4) [ours; the paper is silent]."""
  bound = CONV_WIDTH**-0.5
  shape = (CONV_WIDTH, channels)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def conv_state(
  batch_size: int, channels: int, dtype: jnp.dtype = jnp.float32
) -> ConvState:
  """The empty window, at the start of a sequence."""
  return ConvState(
    jnp.zeros((batch_size, CONV_WIDTH - 1, channels), dtype),
    jnp.zeros((batch_size, CONV_WIDTH - 1), jnp.int32),
  )


@jax.named_scope("conv")
def conv_apply(
  w_4xE: types.Array,
  x_BxTxE: types.Array,
  state: ConvState | None = None,
  segment_ids: types.Array | None = None,
) -> tuple[types.Array, ConvState]:
  """Causal depthwise convolution of width 4: y_t = Σ_j w[3-j] ∘ x_{t-j}.

  Taps stay inside the document. Padding before the first and after the last
  real token of a call leaves no trace: the window skips it. Padding between
  two real tokens of one document, which no packer makes, reads as zeros.

  Args:
    w_4xE: taps, the oldest first; w[3] meets the token itself.
    x_BxTxE: inputs.
    state: the window of the call before; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues with the carried
      document (with document 1 where there is none).

  Returns:
    y_BxTxE in the dtype of x (0 at padding) and the new window.
  """
  batch, tokens, channels = x_BxTxE.shape
  w_4xE = w_4xE.astype(x_BxTxE.dtype)
  fresh = state is None
  if state is None:
    state = conv_state(batch, channels, x_BxTxE.dtype)
    if segment_ids is None:  # Nothing to mask: the path of plain training.
      y_BxTxE = sharding.with_reach(_taps, 3, [x_BxTxE], whole=[w_4xE])
      last = jnp.concatenate([state.inputs_Bx3xE, x_BxTxE[:, -3:]], axis=1)
      ids = (jnp.arange(3) >= 3 - tokens).astype(jnp.int32)
      ids = jnp.broadcast_to(ids[None], (batch, 3))
      return y_BxTxE, ConvState(last[:, -3:], ids)
  if segment_ids is None:
    carried = jnp.maximum(state.segment_Bx3[:, -1:], 1)
    segment_ids = jnp.broadcast_to(carried, (batch, tokens))
  begin, end = real_span(segment_ids > 0)
  buffer = lay(state.inputs_Bx3xE.astype(x_BxTxE.dtype), x_BxTxE, begin)
  ids = lay(state.segment_Bx3, segment_ids, begin)
  index = segments.running_index(segment_ids, previous=state.segment_Bx3[:, -1])
  laid = lay(jnp.zeros_like(state.segment_Bx3), index, begin)
  laid = jnp.where(ids > 0, laid + 1, 0)
  if fresh:  # No token reads what is carried: each shard has enough.
    index = jnp.where(segment_ids > 0, index + 1, 0)
    y_BxTxE = sharding.with_reach(
      lambda x, index, w: _taps(x, w, index), 3, [x_BxTxE, index], whole=[w_4xE]
    )
  else:
    y_BxTxE = _taps(buffer, w_4xE, laid)
  cut = jax.vmap(lambda a, i: jax.lax.dynamic_slice_in_dim(a, i, 3))
  last_ids, last_index = cut(ids, end), cut(laid, end)
  last_ids = jnp.where(last_index == last_index[:, -1:], last_ids, 0)
  return y_BxTxE, ConvState(cut(buffer, end), last_ids)


def short_convs(
  params: types.Params,
  x_BxTxD: types.Array,
  names: tuple[str, ...],
  heads: int,
  windows: dict[str, ConvState] | None,
  segment_ids: types.Array | None,
) -> tuple[dict[str, types.Array], dict[str, ConvState]]:
  """SiLU(conv4(x w_<name>)) for each name (Titans sec. 4.4).

  Args:
    params: with w_<name> (D,E) and conv_<name> (4,E).
    x_BxTxD: inputs.
    names: what to project to.
    heads: H, divides every E.
    windows: of the call before, by name; None at the start of a sequence.
    segment_ids: as `conv_apply`.

  Returns:
    By name: the projections [B,T,H,E/H] and the new windows.
  """
  z, after = {}, {}
  for name in names:
    y, after[name] = conv_apply(
      params[f"conv_{name}"],
      dense(x_BxTxD, params[f"w_{name}"]),
      None if windows is None else windows[name],
      segment_ids,
    )
    with jax.named_scope("conv"):
      z[name] = jax.nn.silu(y).reshape(*y.shape[:2], heads, -1)
  return z, after


def _taps(
  buffer: types.Array, w_4xE: types.Array, index: types.Array | None = None
) -> types.Array:
  """Σ over taps; buffer [B,3+T,E], index [B,3+T] of documents, 0 nothing."""
  tokens = buffer.shape[1] - 3
  total: Any = 0.0
  for tap in range(CONV_WIDTH):
    term = buffer[:, tap : tap + tokens] * w_4xE[tap][None, None]
    if index is not None:
      here = index[:, 3:]
      same = (index[:, tap : tap + tokens] == here) & (here > 0)
      term = jnp.where(same[:, :, None], term, 0)
    total = total + term
  return total


def real_span(real_BxT: types.Array) -> tuple[types.Array, types.Array]:
  """[B] first real position and one past the last; 0, 0 if none is real."""
  tokens = real_BxT.shape[1]
  positions = jnp.arange(tokens, dtype=jnp.int32)[None]
  end = jnp.max(jnp.where(real_BxT, positions + 1, 0), axis=1)
  first = jnp.min(jnp.where(real_BxT, positions, tokens), axis=1)
  return jnp.where(end > 0, first, 0), end


def lay(
  carried: types.Array, new: types.Array, begin: types.Array
) -> types.Array:
  """[B,S+T,...]: new [B,T,...] after S places, carried just before `begin`.

  Args:
    carried: [B,S,...], of calls before.
    new: [B,T,...], of this call.
    begin: int32 [B], the first real token of each row.
  """
  buffer = jnp.concatenate([carried, new], axis=1)
  move = lambda row, part, i: jax.lax.dynamic_update_slice_in_dim(
    row, part, i, axis=0
  )
  return jax.vmap(move)(buffer, carried, begin)


class RMSNorm(nn.Module):
  """`rms_norm` with its scale, started at 1.

  Attributes:
    epsilon: as there.
  """

  epsilon: float = EPSILON

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    """x [..., E] to the same shape."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    return rms_norm(x, scale, self.epsilon)
