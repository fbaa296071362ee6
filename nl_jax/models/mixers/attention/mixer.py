"""Causal softmax attention with RoPE: the mixer of Transformer++.

Multi-head, theta 10000 on the full head width, scale K^-1/2, no biases
(docs/mathematics.md 6); what pretrained models have besides are `Options`. In
the words of Nested Learning the cache is the one level of infinite frequency:
it has no parameters, and every token is appended.

Training, prefill and decoding share one function. Real tokens are appended to
the cache of their row without gaps, so rows may be out of step; padding takes
no slot. Positions restart at each document and no token sees another document.
With a window the cache has W-1 slots, whatever the length of the text.
"""

import dataclasses
import itertools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import fields, sharding, types
from nl_jax.fields import Number, Whole
from nl_jax.kernels.rank_one import segments
from nl_jax.levels import NONPARAMETRIC, LevelRow
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.attention import sliding_window, softmax

# Documents are counted modulo this: a cache never holds as many.
_DOCUMENTS = 2**30


@dataclasses.dataclass(frozen=True)
class Options:
  """What attention may have beyond that of Transformer++; all off.

  Attributes:
    window: W, tokens that each token sees, itself included; 0: all.
    kv_heads: G, heads of keys and values, each shared by H/G query heads next
      to each other; H K need not be D then (Llama 2 and later). 0: H, and
      H K = D.
    bias: biases of queries, keys and values (Qwen2).
    qk_norm: RMSNorm over the K features of queries and keys, before RoPE
      (Qwen3).
    rope_theta: base of the wave lengths.
    rope_scaling: for contexts beyond the trained length (Llama 3.1).
    implementation: what runs a call without a cache: "xla", "pallas_tpu"
      (splash attention), "pallas_interpret", "cudnn" (flash attention on a
      GPU), or "auto", a kernel where the platform and the shapes allow it.
      Calls with a cache run by XLA.
  """

  window: Annotated[int, Whole(2, also=(0,))] = 0
  kv_heads: Annotated[int, Whole(0)] = 0
  bias: bool = False
  qk_norm: bool = False
  rope_theta: Annotated[float, Number(1.0, above=True)] = layers.ROPE_THETA
  rope_scaling: layers.RopeScaling = layers.RopeScaling()
  implementation: softmax.Implementation = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))


def check(model: contract.Dims) -> None:
  """Raises ValueError for heads that do not fit each other or the width."""
  kv_heads = options(model).kv_heads
  if kv_heads == 0:
    contract.check_heads(model, even=True)
    return
  contract.check_even(model)
  if type(kv_heads) is not int or kv_heads < 0 or model.heads % kv_heads:
    raise ValueError(
      "model.mixer.kv_heads must be an integer that divides model.heads="
      f"{model.heads}, or 0 for as many, got {kv_heads!r}"
    )


def options(model: contract.Dims) -> Options:
  """The switches of a model; without the group `model.mixer`, all off."""
  return Options() if model.mixer is None else model.mixer


def _kv_heads(model: contract.Dims) -> int:
  return options(model).kv_heads or model.heads


class AttentionState(NamedTuple):
  """The cache of one layer.

  Attributes:
    keys_BxSxHxK: rotated keys of the tokens seen, in order, then zeros; H is
      that of keys and values. With a window of W: the last S = W-1, in order,
      after zeros where there were fewer.
    values_BxSxHxK: their values.
    slot_document_BxS: int32, the document of each slot; 0 where it is empty.
    length_B: int32, slots in use.
    document_B: int32, the current document, counted from 1, and from 1 again
      after 2^30.
    segment_B: int32, the segment id of the last token; 0 before the first.
    position_B: int32, tokens of the current document so far, modulo 2^32, see
      `layers.rope`.
  """

  keys_BxSxHxK: types.Array
  values_BxSxHxK: types.Array
  slot_document_BxS: types.Array
  length_B: types.Array
  document_B: types.Array
  segment_B: types.Array
  position_B: types.Array


class _Places(NamedTuple):
  """Where the tokens of a call stand.

  Attributes:
    real_BxT: bool, no padding.
    document_BxT: int32, counted as in `AttentionState.document_B`.
    position_BxT: int32, from the start of the document, modulo 2^32.
    slot_BxT: int32, in a cache without a window; past its end for padding.
  """

  real_BxT: types.Array
  document_BxT: types.Array
  position_BxT: types.Array
  slot_BxT: types.Array


def _attend(
  q: types.Array,
  k: types.Array,
  v: types.Array,
  state: AttentionState | None,
  segment_ids: types.Array | None,
  options: Options = Options(),
) -> tuple[types.Array, AttentionState]:
  """Rotates, appends to the cache and attends.

  q is [B,T,H,K], k and v are [B,T,G,K].
  """
  batch, tokens, heads, head_dim = k.shape
  fresh = state is None
  if state is None:
    slots = options.window - 1 if options.window else tokens
    state = empty(batch, slots, heads, head_dim, q.dtype)
  if fresh and segment_ids is None:  # Positions are the same in all rows.
    ids = None
    steps = jnp.arange(tokens, dtype=jnp.int32)
    steps = jnp.broadcast_to(steps[None], (batch, tokens))
    real = jnp.ones_like(steps, bool)
    places = _Places(real, jnp.ones_like(steps), steps, steps)
  else:
    ids = segment_ids
    if ids is None:
      ids = jnp.maximum(state.segment_B, 1)
      ids = jnp.broadcast_to(ids[:, None], (batch, tokens))
    places = _locate(ids, state)
  turns = (places.position_BxT, options.rope_theta, options.rope_scaling)
  q, k = layers.rope(q, *turns), layers.rope(k, *turns)
  if options.window:
    return _attend_window(q, k, v, state, places, ids, fresh, options)
  new_state = _append(state, k, v, places, ids)
  if fresh:  # The call's own tokens are all there is: no cache copy.
    return _attend_own(q, k, v, places, ids, options), new_state
  slot = jnp.arange(new_state.keys_BxSxHxK.shape[1], dtype=jnp.int32)
  mask = slot[None, None] <= places.slot_BxT[:, :, None]
  mask &= (
    new_state.slot_document_BxS[:, None] == places.document_BxT[:, :, None]
  )
  y = softmax.attention(
    q, new_state.keys_BxSxHxK, new_state.values_BxSxHxK, mask[:, None]
  )
  return _real(y, places), new_state


def _attend_own(
  q: types.Array,
  k: types.Array,
  v: types.Array,
  places: _Places,
  ids: types.Array | None,
  options: Options,
) -> types.Array:
  """Causal attention among a call's tokens; T <= W without the kernel."""
  document = jnp.where(places.real_BxT, places.document_BxT, 0)
  kernel = softmax.kernel(q, k, options.implementation)
  if kernel is not None:
    own = None if ids is None else document
    y = softmax.fused_attention(q, k, v, own, options.window, kernel)
    return y if ids is None else _real(y, places)
  # Each shard of a text has the keys and values of all of it.
  k, v = sharding.whole_rows(k), sharding.whole_rows(v)
  if ids is None:
    return softmax.attention(q, k, v, None)
  mask = jnp.tril(jnp.ones((1,) + 2 * (q.shape[1],), bool))
  mask &= document[:, None] == places.document_BxT[:, :, None]
  return _real(softmax.attention(q, k, v, mask[:, None]), places)


def _attend_window(
  q: types.Array,
  k: types.Array,
  v: types.Array,
  state: AttentionState,
  places: _Places,
  ids: types.Array | None,
  fresh: bool,
  options: Options,
) -> tuple[types.Array, AttentionState]:
  """Attention along the band, and the window after the call."""
  document = jnp.where(places.real_BxT, places.document_BxT, 0)
  lay = lambda carried, new: sliding_window.lay(carried, new, places.real_BxT)
  keys, last_keys = lay(state.keys_BxSxHxK, k)
  values, last_values = lay(state.values_BxSxHxK, v)
  documents, last_documents = lay(state.slot_document_BxS, document)
  new_state = AttentionState(
    last_keys, last_values, last_documents, *_clocks(state, places, ids)
  )
  within = q.shape[1] <= options.window
  if fresh and (within or softmax.kernel(q, k, options.implementation)):
    return _attend_own(q, k, v, places, ids, options), new_state
  if fresh:
    y = sliding_window.attend_own(
      q, k, v, places.document_BxT, document, options.window
    )
  else:
    y = sliding_window.attend(q, keys, values, places.document_BxT, documents)
  return _real(y, places), new_state


def _real(y_BxTxHxK: types.Array, places: _Places) -> types.Array:
  """0 at padding, which sees nothing: there softmax is uniform."""
  return jnp.where(places.real_BxT[:, :, None, None], y_BxTxHxK, 0)


def _locate(ids: types.Array, state: AttentionState) -> _Places:
  """Documents, positions and slots of a call's tokens; ids [B,T]."""
  real = ids > 0
  index = segments.running_index(ids, state.segment_B)
  position, _ = layers.positions(index, real, state.position_B)
  rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # Among real tokens.
  capacity = state.keys_BxSxHxK.shape[1]
  return _Places(
    real,
    (state.document_B[:, None] - 1 + index) % _DOCUMENTS + 1,
    position,
    jnp.where(real, state.length_B[:, None] + rank, capacity),
  )


def _append(
  state: AttentionState,
  k: types.Array,
  v: types.Array,
  places: _Places,
  ids: types.Array | None,
) -> AttentionState:
  """The cache with the real tokens added; those past its end are dropped."""
  if ids is None:  # A fresh cache, filled exactly.
    last = jnp.full_like(state.length_B, k.shape[1])
    one = jnp.ones_like(last)
    return AttentionState(k, v, places.document_BxT, last, one, one, last)
  rows = jnp.arange(ids.shape[0])[:, None]
  put = lambda cache, new: cache.at[rows, places.slot_BxT].set(
    new.astype(cache.dtype), mode="drop"
  )
  return AttentionState(
    put(state.keys_BxSxHxK, k),
    put(state.values_BxSxHxK, v),
    put(state.slot_document_BxS, places.document_BxT),
    *_clocks(state, places, ids),
  )


def _clocks(
  state: AttentionState, places: _Places, ids: types.Array | None
) -> tuple[types.Array, ...]:
  """length_B, document_B, segment_B and position_B after the call."""
  count = jnp.sum(places.real_BxT, axis=1, dtype=jnp.int32)
  if ids is None:
    ids = places.document_BxT
  last = jnp.max(
    jnp.where(places.real_BxT, jnp.arange(ids.shape[1])[None], 0), axis=1
  )
  at_last = lambda new, old: jnp.where(
    count > 0, jnp.take_along_axis(new, last[:, None], axis=1)[:, 0], old
  )
  return (
    # Not beyond the cache: a counter of all tokens would overflow.
    jnp.minimum(state.length_B + count, state.keys_BxSxHxK.shape[1]),
    at_last(places.document_BxT, state.document_B),
    at_last(ids, state.segment_B),
    at_last(places.position_BxT + 1, state.position_B),
  )


def empty(
  batch: int, slots: int, heads: int, head_dim: int, dtype: jnp.dtype
) -> AttentionState:
  """A cache of no tokens; with a window of W, `slots` is W-1."""
  shape = (batch, slots, heads, head_dim)
  zero = jnp.zeros((batch,), jnp.int32)
  return AttentionState(
    jnp.zeros(shape, dtype),
    jnp.zeros(shape, dtype),
    jnp.zeros((batch, slots), jnp.int32),
    zero,
    zero + 1,
    zero,
    zero,
  )


def leaves(model: contract.Dims) -> contract.Leaves:
  """w_q (D,HK), w_k, w_v (D,GK) and w_o (HK,D) of one layer.

  With `Options.bias` also b_q, b_k, b_v; with `qk_norm` q_norm and k_norm.
  """
  D, K, switches = model.width, model.head_dim, options(model)
  widths = {"q": model.heads * K, "k": _kv_heads(model) * K}
  number, made = itertools.count(1), {}

  def matrix(
    shape: tuple[int, int], axes: tuple[str, str], std: float
  ) -> leaf.Leaf:
    init = jax.nn.initializers.normal(std)
    return leaf.Leaf(shape, axes, init, True, True, (leaf.linen(next(number)),))

  for name, inner in (widths | {"v": widths["k"]}).items():
    made[f"w_{name}"] = matrix((D, inner), leaf.IN, layers.INIT_STD)
    if switches.bias:
      next(number)
      made[f"b_{name}"] = leaf.constant((inner,), ("heads",))
    if switches.qk_norm and name != "v":
      made[f"{name}_norm/scale"] = leaf.scale(K)
  std = layers.residual_std(model.layers)
  return made | {"w_o": matrix((widths["q"], D), leaf.OUT, std)}


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: AttentionState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, AttentionState, dict]:
  """Mixes the tokens of one layer.

  Args:
    params: of one layer.
    x_BxTxD: normalised input.
    state: the cache to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues with the document of
      the state.
    model: heads, head_dim and layers.

  Returns:
    y_BxTxD (0 at padding before the output kernel), the cache after the call
    (where state is None: with T slots), and no metrics.
  """
  switches = options(model)

  def project(name: str) -> types.Array:
    y = layers.dense(x_BxTxD, params[f"w_{name}"])
    if switches.bias:
      y = y + params[f"b_{name}"].astype(y.dtype)[None, None]
    y = y.reshape(*y.shape[:2], -1, model.head_dim)
    if switches.qk_norm and name != "v":
      scale = params[f"{name}_norm"]["scale"]
      y = layers.rms_norm(y, scale, model.norm_epsilon)
    return y

  q, k, v = map(project, "qkv")
  y_BxTxHxK, state = _attend(q, k, v, state, segment_ids, switches)
  y_BxTxHK = y_BxTxHxK.reshape(*x_BxTxD.shape[:2], -1)
  return layers.dense(y_BxTxHK, params["w_o"]), state, {}


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> AttentionState:
  """An empty cache of one layer with `length` slots a row, or a window's."""
  dtype = layers.activation_dtype(model.dtype, params)
  return _empty_of(model, batch_size, length, dtype)


def _empty_of(
  model: contract.Dims, batch_size: int, length: int, dtype: Any
) -> AttentionState:
  window = options(model).window
  slots = window - 1 if window else length
  return empty(batch_size, slots, _kv_heads(model), model.head_dim, dtype)


def levels(model: contract.Dims) -> list[LevelRow]:
  """The cache; its projections are among the slow weights."""
  state = jax.eval_shape(
    lambda: _empty_of(model, 1, model.sequence_length, model.dtype)
  )
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
  return [
    LevelRow(
      name="attention",
      kind="attention",
      chunk=NONPARAMETRIC,
      objective="softmax regression",
      rule="append",
      transfer="nonparametric",
      state_bytes=size * model.layers,
    )
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer."""
  keys = min(options(model).window or tokens, tokens)
  both = model.heads + _kv_heads(model)
  return counting.Flops(
    projections=4.0 * model.width * model.head_dim * both,
    attention=counting.scores(model.heads, model.head_dim, keys),
  )


def grows(model: contract.Dims) -> bool:
  """Whether the cache is unbounded: without a window."""
  return not options(model).window


LAYERS, WHOLE = 1, None
residual = contract.around(apply)
starts, alignment = contract.empty, contract.anywhere
