"""What Titans with attention beside its memory share (arXiv 2501.00663).

The long-term memory is `titans`, whole. Here: the short-term branch, softmax
attention with RoPE whose queries see a bounded past and, all of them, N learned
*persistent tokens* P; and how two branches become one output:

    out = n1(y) * gate(n2(m)),   n an RMSNorm with a learned vector scale

The three variants are `titans_mag` (gate), `titans_mal` (layer) and
`titans_mac` (context).
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import types
from nl_jax.fields import OneOf, Whole
from nl_jax.kernels.rank_one import segments
from nl_jax.levels import NONPARAMETRIC, LevelRow
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.attention import sliding_window, softmax
from nl_jax.models.mixers.titans import lmm as titans

GATES = {
  "sigmoid": jax.nn.sigmoid,
  "silu": jax.nn.silu,
  "linear": lambda x: x,
}
Gate = Annotated[str, OneOf(*GATES)]


@dataclasses.dataclass(frozen=True)
class Options(titans.Options):
  """The switches of the memory, and this.

  Attributes:
    persistent: N, learned tokens that every query attends to; 0: none. Ours,
      unstated.
  """

  # Deviation: P stands before the text for attention alone, not for the
  # memory, because what reading P would make of its learned start is itself a
  # learned start; so no call and no packed document has to read P first.
  persistent: Annotated[int, Whole(0)] = 4


def check(model: contract.Dims) -> None:
  """Raises ValueError for heads that do not fit the width, or RoPE."""
  contract.check_heads(model, even=True)


class WindowState(NamedTuple):
  """The last W-1 tokens of each row; it does not grow.

  Attributes:
    keys_BxSxHxK: rotated keys, the newest last; S = W-1.
    values_BxSxHxK: their values.
    slot_document_BxS: int32, 1 for tokens of the current document, else 0.
    segment_B: int32, the segment id of the last token; 0 before the first.
    position_B: int32, tokens of the current document so far, modulo 2^32, see
      `layers.rope`.
  """

  keys_BxSxHxK: types.Array
  values_BxSxHxK: types.Array
  slot_document_BxS: types.Array
  segment_B: types.Array
  position_B: types.Array


class HybridState(NamedTuple):
  """What a layer of two branches carries from call to call.

  Attributes:
    attention: of the short-term branch.
    lmm: of the long-term memory.
  """

  attention: WindowState
  lmm: titans.TitansState


def leaves(
  model: contract.Dims, norms: tuple[str, ...]
) -> dict[str, leaf.Leaf]:
  """The parameters of one layer.

  attention {w_q, w_k, w_v (D,HK), w_o (HK,D)}, lmm (of `titans.leaves`),
  <branch>_norm {scale (D,)} for each of norms, persistent (N,D) unless N is 0.

  Args:
    model: shapes and switches.
    norms: branches whose output is normalised.
  """
  D, std = model.width, layers.residual_std(model.layers)
  attention = {
    "w_q": leaf.kernel((D, D), leaf.IN, 2),
    "w_k": leaf.kernel((D, D), leaf.IN, 3),
    "w_v": leaf.kernel((D, D), leaf.IN, 4),
    "w_o": leaf.kernel((D, D), leaf.OUT, 5, std),
  }
  made = leaf.under("attention", attention)
  made |= leaf.under("lmm", titans.leaves(model), 0)
  for name in norms:
    made[f"{name}_norm/scale"] = leaf.scale(D, "act_embed")
  if model.mixer.persistent:
    shape = (model.mixer.persistent, D)
    tokens = leaf.kernel(shape, ("chunk", "act_embed"), 1)
    made["persistent"] = dataclasses.replace(tokens, matrix=False)
  return made


def project(
  kernels: types.Params,
  names: str,
  x_BxTxD: types.Array,
  model: contract.Dims,
) -> tuple[types.Array, ...]:
  """[B,T,H,K] for each letter of names, out of q, k and v."""
  shape = (*x_BxTxD.shape[:2], model.heads, model.head_dim)
  return tuple(
    layers.dense(x_BxTxD, kernels[f"w_{name}"]).reshape(shape) for name in names
  )


def persistent(
  params: types.Params,
  first: int,
  dtype: jnp.dtype,
  model: contract.Dims,
) -> tuple[types.Array, types.Array] | None:
  """Keys and values [1,N,H,K] of the persistent tokens; None where N is 0.

  Args:
    params: of one layer.
    first: position that the last one stands before.
    dtype: of activations.
    model: shapes and switches.
  """
  count = model.mixer.persistent
  if not count:
    return None
  P_1xNxD = params["persistent"][None].astype(dtype)
  k, v = project(params["attention"], "kv", P_1xNxD, model)
  places = first - count + jnp.arange(count, dtype=jnp.int32)
  return layers.rope(k, places[None]), v


@jax.named_scope("attention")
def attend(
  params: types.Params,
  q_BxTxHxK: types.Array,
  k: types.Array,
  v: types.Array,
  mask_BxTxS: types.Array,
  first: int,
  model: contract.Dims,
) -> types.Array:
  """Softmax attention over the persistent tokens and some others.

  Args:
    params: of one layer.
    q_BxTxHxK: rotated queries.
    k, v: [B,S,H,K], the others, keys rotated.
    mask_BxTxS: bool, which of these a query sees.
    first: position that the last persistent token stands before.
    model: shapes and switches.

  Returns:
    y_BxTxHxK, without meaning for a query that sees nothing.
  """
  always = persistent(params, first, q_BxTxHxK.dtype, model)
  if always is not None:
    k, v, mask_BxTxS = sliding_window.before(always, k, v, mask_BxTxS)
  return softmax.attention(q_BxTxHxK, k, v, mask_BxTxS[:, None])


def project_out(
  params: types.Params, y_BxTxHxK: types.Array, real_BxT: types.Array
) -> types.Array:
  """y w_o [B,T,D], of zeros at padding."""
  y_BxTxHxK = jnp.where(real_BxT[:, :, None, None], y_BxTxHxK, 0)
  y_BxTxHK = y_BxTxHxK.reshape(*real_BxT.shape, -1)
  return layers.dense(y_BxTxHK, params["attention"]["w_o"])


@jax.named_scope("attention")
def window(
  params: types.Params,
  x_BxTxD: types.Array,
  state: WindowState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, WindowState]:
  """Attention of each token to itself, W-1 before it, and P.

  P stands at positions -N to -1 of every document, whose own begin at 0.

  Args:
    params: of one layer.
    x_BxTxD: input.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    y_BxTxD and the state after the call.
  """
  batch, tokens, _ = x_BxTxD.shape
  fresh = state is None
  if state is None:
    state = empty_window(batch, model, x_BxTxD.dtype)
  ids = segment_ids
  if ids is None:
    ids = jnp.maximum(state.segment_B, 1)[:, None]
    ids = jnp.broadcast_to(ids, (batch, tokens))
  real = ids > 0
  index = segments.running_index(ids, state.segment_B)
  document = index + 1  # 1 is the carried one.
  position, position_B = layers.positions(index, real, state.position_B)
  q, k, v = project(params["attention"], "qkv", x_BxTxD, model)
  q, k = layers.rope(q, position), layers.rope(k, position)
  keys, last_keys = sliding_window.lay(state.keys_BxSxHxK, k, real)
  values, last_values = sliding_window.lay(state.values_BxSxHxK, v, real)
  own = jnp.where(real, document, 0)
  documents, slots = sliding_window.lay(state.slot_document_BxS, own, real)
  always = persistent(params, 0, x_BxTxD.dtype, model)
  if fresh:
    y = sliding_window.attend_own(
      q, k, v, document, own, model.mixer.window, always
    )
  else:
    y = sliding_window.attend(q, keys, values, document, documents, always)
  at = jnp.max(jnp.where(real, jnp.arange(tokens)[None], 0), axis=1)[:, None]
  last = lambda new, old: jnp.where(
    real.any(axis=1), jnp.take_along_axis(new, at, axis=1)[:, 0], old
  )
  state = WindowState(
    last_keys,
    last_values,
    (slots == document[:, -1:]).astype(jnp.int32),
    last(ids, state.segment_B),
    position_B,
  )
  return project_out(params, y, real), state


def empty_window(
  batch_size: int, model: contract.Dims, dtype: Any
) -> WindowState:
  """The window at the start of a sequence."""
  slots = (batch_size, model.mixer.window - 1)
  cache = jnp.zeros((*slots, model.heads, model.head_dim), dtype)
  clock = jnp.zeros((batch_size,), jnp.int32)
  return WindowState(cache, cache, jnp.zeros(slots, jnp.int32), clock, clock)


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> HybridState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  dtype = layers.activation_dtype(model.dtype, params)
  return HybridState(
    empty_window(batch_size, model, dtype),
    titans.init_state(params["lmm"], batch_size, length, model=model),
  )


def starts(
  params: types.Params, model: contract.Dims
) -> dict[str, types.Params]:
  """The learned starts of the memory."""
  own = titans.starts(params["lmm"], model)
  return {f"lmm/{place}": start for place, start in own.items()}


def normed(
  params: types.Params, branch: str, x: types.Array, model: contract.Dims
) -> types.Array:
  """RMSNorm of a branch's output, with its own scale."""
  scale = params[f"{branch}_norm"]["scale"]
  return layers.rms_norm(x, scale, model.norm_epsilon)


def branches(long_term: LevelRow, name: str, slots: int) -> list[LevelRow]:
  """The memory and the attention beside it.

  Args:
    long_term: the memory's row.
    name: of the attention's row.
    slots: bytes of its state, over all layers.
  """
  return [
    long_term,
    LevelRow(
      name=name,
      kind="attention",
      chunk=NONPARAMETRIC,
      objective="softmax regression",
      rule="append",
      transfer="nonparametric",
      state_bytes=slots,
    ),
  ]


def window_levels(model: contract.Dims) -> list[LevelRow]:
  """`branches` of a layer with a window."""
  state = jax.eval_shape(lambda: empty_window(1, model, model.dtype))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
  name = f"attention to {model.mixer.window}"
  return branches(titans.levels(model)[0], name, size * model.layers)


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in a layer with a window and persistent tokens."""
  options, D = model.mixer, model.width
  keys = min(options.window, tokens) + options.persistent
  own = counting.Flops(
    projections=8.0 * D * D + 4.0 * D * D * options.persistent / tokens,
    attention=counting.scores(model.heads, model.head_dim, keys),
  )
  return counting.add(own, titans.flops(model, tokens))
