"""Titans, memory as context (MAC): attention over sections that recalls.

For each section x of S tokens, with M the memory as the section finds it and P
the persistent tokens (Titans sec. 4.1, eq. 21-25; docs/mathematics.md 6):

    h = RMSNorm_K(M(l2(SiLU(conv4(x W_Q)))))                     recall
    y = n1(causal attention of x over [P | h | x])
    m = LMM(y): the memory learns y, and is read again at each token
    out = y * sigmoid(n2(m))

h_i depends on x_i and is masked causally, as x is; and the second read of a
token sees the memory after that token, not after the section. Public versions
recall and write in another order (docs/mathematics.md 8.3).

The section is a chunk of `memory.chunked`: the anchor of that walk is the
memory that h reads, and what attention has seen of an open section is carried
beside it.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import memory, types
from nl_jax.fields import Only, Whole
from nl_jax.kernels import walk as kernels
from nl_jax.kernels.rank_one import segments
from nl_jax.levels import LevelRow
from nl_jax.models import flops as counting
from nl_jax.models import layers
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.titans import hybrid as titans_hybrid
from nl_jax.models.mixers.titans import lmm as titans

_NORMS = ("attention", "lmm")


@dataclasses.dataclass(frozen=True)
class Options(titans_hybrid.Options):
  """The switches of the memory, its persistent tokens, and these.

  Attributes:
    segment: S, tokens of a section, which attend to each other; a multiple of
      the memory's chunk. Documents of a packed row begin at its multiples.
    mag_gate: what the memory's normalised output goes through: "sigmoid",
      "silu" or "linear" (as it is); ours, unstated.
  """

  # The memory goes from section to section.
  span: Annotated[int, Only(0, titans.LMM)] = 0
  segment: Annotated[int, Whole(2)] = 1024
  mag_gate: titans_hybrid.Gate = "sigmoid"

  def __post_init__(self):
    super().__post_init__()
    if self.segment % self.chunk:
      raise ValueError(
        "model.mixer.segment must be a multiple of model.mixer.chunk="
        f"{self.chunk}, got {self.segment}"
      )


class Cache(NamedTuple):
  """What attention has seen of the open sections; slot i holds place i.

  Attributes:
    keys_BxSxHxK, values_BxSxHxK: of the tokens, keys rotated.
    recall_keys_BxSxHxK, recall_values_BxSxHxK: of what each recalled.
    slot_document_BxS: int32, the document of each slot, 0 where it is empty;
      between calls 1 is the current one.
  """

  keys_BxSxHxK: types.Array
  values_BxSxHxK: types.Array
  recall_keys_BxSxHxK: types.Array
  recall_values_BxSxHxK: types.Array
  slot_document_BxS: types.Array


class SectionState(NamedTuple):
  """What else goes from one section to the next, all 0 before a document.

  Attributes:
    anchor, s, carried: of the memory, see `memory.MemoryState`; what that has
      as w is the w of the walk over sections.
    convs: windows of the short convolutions of the memory.
    cache: see `Cache`.
    document_B: int32, the document of the last token; between calls 1, or 0
      before the first token.
  """

  anchor: dict[str, types.Array]
  s: dict[str, types.Array]
  carried: dict[str, types.Array]
  convs: dict[str, layers.ConvState]
  cache: Cache
  document_B: types.Array


class MACState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    recall: the window of the recall's queries.
    segment: the walk over sections. anchor: the memory at the start of the
      open one; w: now; carried: a `SectionState`.
  """

  recall: layers.ConvState
  segment: memory.MemoryState


check = titans_hybrid.check


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer, see `titans_hybrid.leaves`."""
  return titans_hybrid.leaves(model, _NORMS)


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: MACState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, MACState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer; arguments and returns as `titans.apply`."""
  batch, tokens, _ = x_BxTxD.shape
  fresh, options = state is None, model.mixer
  if state is None:
    state = init_state(params, batch, 0, model=model)
  walk, lmm = state.segment, params["lmm"]
  # Deviation: Titans has no convolution, norm or heads in h; these are the
  # memory's own way to read, so both reads of a token go through one W_Q.
  query, recall = layers.short_convs(
    {"w_q": lmm["w_q"], "conv_q": lmm["conv_q"]},
    x_BxTxD,
    ("q",),
    model.heads,
    None if fresh else {"q": state.recall},
    segment_ids,
  )
  q, k, v = titans_hybrid.project(params["attention"], "qkv", x_BxTxD, model)
  places = memory.chunked.places(walk, segment_ids, tokens, options.segment)
  order = jnp.arange(tokens, dtype=jnp.int32)[None, :, None]
  document = jnp.ones_like(order)
  if segment_ids is not None and not fresh:
    # As the call counts them; from a fresh start a section has one.
    index = segments.running_index(segment_ids, walk.segment)
    document = index[:, :, None] + 1
  wide = lambda x: jnp.broadcast_to(x, (batch, tokens, model.heads))
  xs = (
    layers.l2_norm(query["q"]), layers.rope(q, places), layers.rope(k, places),
    v, wide(order), wide(document), wide(places[:, :, None]),
  )  # fmt: skip
  dtype = jax.tree.leaves(walk.w)[0].dtype

  def body(start, now, xs, at):
    if options.stop_grad_writes:
      now = jax.lax.stop_gradient(now)
    block = memory.block.Block(start, now.w, *now.s, at)
    own = [x.astype(x_BxTxD.dtype) for x in xs[1:4]]
    count = [x[:, 0, :, 0].astype(jnp.int32) for x in xs[4:]]
    y, w, carried, learned = _section(
      params, model, fresh, block, xs[0], *own, *count
    )
    sums = jnp.stack(learned, axis=-1)[:, :, None]
    return kernels.State(w, (now.s[0], carried)), y, sums

  y, walk, sums = memory.chunked.walk(
    body,
    walk,
    jax.tree.map(lambda w: w.astype(dtype), lmm["memory"]),
    xs,
    chunk=options.segment,
    group=1,
    segment_ids=segment_ids,
    at_edge=fresh,
    aligned=fresh,
    # Attention stands in the chunk function: no kernel.
    run=memory.Run("xla", layers.run("xla").spec),
    name="mac_segments",
  )
  walk = walk._replace(carried=_renumbered(walk.carried))
  metrics = {"memory": memory.block.metrics(sums)}
  return y, MACState(recall["q"], walk), metrics


def _renumbered(s: SectionState) -> SectionState:
  """Documents counted as the next call counts them: the carried one is 1."""
  one = lambda ids: jnp.minimum(ids, 1)
  convs = {
    name: window._replace(segment_Bx3=one(window.segment_Bx3))
    for name, window in s.convs.items()
  }
  slots = one(s.cache.slot_document_BxS)
  return s._replace(
    convs=convs,
    cache=s.cache._replace(slot_document_BxS=slots),
    document_B=one(s.document_B),
  )


def _section(
  params: types.Params,
  model: contract.Dims,
  fresh: bool,
  block: memory.block.Block,
  recall: types.Array,
  q: types.Array,
  k: types.Array,
  v: types.Array,
  order: types.Array,
  ids: types.Array,
  place: types.Array,
) -> tuple[types.Array, Any, SectionState, memory.Metrics]:
  """One section, or one token of it; inputs [B,H,c,K], c = S or 1.

  Args:
    params, model: as `apply`.
    fresh: whether all rows began the call at the start of a sequence.
    block: memory and documents, see its type.
    recall: unit queries.
    q, k, v: of the tokens, rotated.
    order: int32 [B,c], the number of each token in the call.
    ids: int32 [B,c], documents, 0 is padding.
    place: int32 [B,c], the place of each in its section.

  Returns:
    out [B,1,c,D], the memory, what else is carried, and its metrics.
  """
  s: Any = block.carried  # The walk carries the section there.
  real, size = ids != 0, ids.shape[1]
  # Tokens of the open section in earlier calls: at the block's head those are
  # masked, unless it is a single token.
  seen_B = place[:, 0]
  if size > 1:
    ahead = jnp.arange(size, dtype=jnp.int32)[None] - order
    seen_B = jnp.max(jnp.where(real, jnp.maximum(ahead, 0), 0), axis=1)
  h = model.mixer.forward(block.at_anchor, recall)
  h = layers.rms_norm(h, params["lmm"]["norm"]["scale"]).astype(q.dtype)
  h, q, k, v = (jnp.swapaxes(x, 1, 2) for x in (h, q, k, v))
  cache, mask = _extend(params, model, seen_B, ids, s.cache, k, v, h)
  y = titans_hybrid.attend(
    params,
    q,
    jnp.concatenate([cache.recall_keys_BxSxHxK, cache.keys_BxSxHxK], axis=1),
    jnp.concatenate(
      [cache.recall_values_BxSxHxK, cache.values_BxSxHxK], axis=1
    ),
    jnp.concatenate([mask, mask], axis=2),
    -model.mixer.segment,
    model,
  )
  y_BxcxD = titans_hybrid.project_out(params, y, real)
  y_BxcxD = titans_hybrid.normed(params, "attention", y_BxcxD, model)
  m_BxcxD, w, s, metrics = _learn(
    params, model, fresh, seen_B, block, ids, y_BxcxD
  )
  slots = cache.slot_document_BxS
  slots = jnp.where(slots == s.document_B[:, None], slots, 0)
  s = s._replace(cache=cache._replace(slot_document_BxS=slots))
  gate = titans_hybrid.GATES[model.mixer.mag_gate]
  gate_BxcxD = gate(titans_hybrid.normed(params, "lmm", m_BxcxD, model))
  return (y_BxcxD * gate_BxcxD)[:, None], w, s, metrics


def _extend(
  params: types.Params,
  model: contract.Dims,
  seen_B: types.Array,
  ids: types.Array,
  cache: Cache,
  k: types.Array,
  v: types.Array,
  h: types.Array,
) -> tuple[Cache, types.Array]:
  """The cache with a block's tokens, and which slots each of these sees.

  Args:
    params, model, seen_B: as `_section`.
    ids: int32 [B,c], documents.
    cache: before the block.
    k, v: [B,c,H,K], keys rotated.
    h: [B,c,H,K], what was recalled.

  Returns:
    The cache and a mask bool [B,c,S].
  """
  S = model.mixer.segment
  batch, size = ids.shape
  slot = jnp.arange(S, dtype=jnp.int32)[None]
  # A section's tokens lie at their places, a single one where `seen_B` says.
  at = seen_B[:, None] if size == 1 else jnp.broadcast_to(slot, (batch, S))
  real = ids != 0
  hit = (slot == at) & real
  recall_k, recall_v = titans_hybrid.project(
    params["attention"], "kv", h.reshape(batch, size, -1), model
  )
  new = (k, v, layers.rope(recall_k, at - S), recall_v)
  kept = [
    jnp.where(hit[:, :, None, None], x, old) for x, old in zip(new, cache)
  ]
  # What a full section left behind is not seen by the next one.
  begins = (seen_B == 0) & real.any(axis=1)
  held = jnp.where(begins[:, None], 0, cache.slot_document_BxS)
  slots = jnp.where(hit, ids, held)
  mask = (slots[:, None] == ids[:, :, None]) & real[:, :, None]
  mask &= slot[:, None] <= at[:, :, None]
  return Cache._make([*kept, slots]), mask


def _learn(
  params: types.Params,
  model: contract.Dims,
  fresh: bool,
  seen_B: types.Array,
  block: memory.block.Block,
  ids: types.Array,
  y_BxcxD: types.Array,
) -> tuple[types.Array, Any, SectionState, memory.Metrics]:
  """Writes a block's attention outputs into the memory, and reads it.

  Args:
    params, model, fresh, seen_B, block: as `_section`.
    ids: int32 [B,c], documents.
    y_BxcxD: what to learn.

  Returns:
    m_BxcxD, the memory, what else is carried (the cache as it was), metrics.
  """
  s: Any = block.carried
  real = ids != 0
  place = seen_B % model.mixer.chunk
  # At the start of a document the walk has reset w and nothing else.
  first = jnp.argmax(real, axis=1)[:, None]
  first = jnp.take_along_axis(ids, first, axis=1)[:, 0]
  edge = real.any(axis=1) & (place == 0)
  fast: Any = memory.MemoryState(
    jax.tree.map(
      lambda w, a: jnp.where(edge[:, None, None, None], w, a),
      block.w,
      s.anchor,
    ),
    dict(block.w),
    s.s,
    s.carried,
    place,
    jnp.where(s.document_B == 0, first, s.document_B),
  )
  # The memory's walk resumes from its open chunk: not after a masked head.
  turns = not fresh and ids.shape[1] > 1
  turn = jax.vmap(lambda x, by: jnp.roll(x, by, axis=0))
  y, ids = (turn(x, -seen_B) if turns else x for x in (y_BxcxD, ids))
  m_BxcxD, after, metrics = titans.advance(
    params["lmm"], y, s.convs, fast, ids, model=model, at_edge=fresh
  )
  fast = after.memory
  s = SectionState(
    fast.anchor, fast.s, fast.carried, after.convs, s.cache, fast.segment
  )
  m_BxcxD = turn(m_BxcxD, seen_B) if turns else m_BxcxD
  return m_BxcxD, fast.w, s, metrics["memory"]


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> MACState:
  """The state of one layer at the start of a sequence; no use of `length`."""
  lmm = titans.init_state(params["lmm"], batch_size, length, model=model)
  fast: Any = lmm.memory
  clock = fast.phase
  dtype = layers.activation_dtype(model.dtype, params)
  s = SectionState(
    jax.tree.map(jnp.zeros_like, fast.w),
    fast.s,
    fast.carried,
    lmm.convs,
    _empty_cache(model, batch_size, dtype),
    clock,
  )
  section = memory.MemoryState(fast.w, fast.w, {}, s, clock, clock)
  return MACState(lmm.convs["q"], section)


def starts(
  params: types.Params, model: contract.Dims
) -> dict[str, types.Params]:
  """The learned starts: of the walk over sections, and of the memory's own."""
  start = titans.starts(params["lmm"], model)["memory"]
  return {"segment": start, "segment/carried": start}


def _empty_cache(model: contract.Dims, batch_size: int, dtype: Any) -> Cache:
  slots = (batch_size, model.mixer.segment)
  empty = jnp.zeros((*slots, model.heads, model.head_dim), dtype)
  return Cache(empty, empty, empty, empty, jnp.zeros(slots, jnp.int32))


def alignment(model: contract.Dims) -> int:
  """The section: documents begin at its edges."""
  return model.mixer.segment


def levels(model: contract.Dims) -> list[LevelRow]:
  """The memory, and attention in a section."""
  cache = jax.eval_shape(lambda: _empty_cache(model, 1, model.dtype))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
  name = f"attention in sections of {model.mixer.segment}"
  slots = size * model.layers
  total = contract.state_bytes(leaves(model), init_state, model)
  row = titans.levels(model)[0]
  row = dataclasses.replace(row, state_bytes=total - slots)
  return titans_hybrid.branches(row, name, slots)


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in one layer, whose attention sees what each recalls."""
  options, D, K = model.mixer, model.width, model.head_dim
  keys = 2 * min(options.segment, tokens) + options.persistent
  shapes = counting.layers_of(options.memory, K, options.hidden)
  own = counting.Flops(
    # W_q of the recall, keys and values of tokens and of what they recall.
    projections=14.0 * D * D + 4.0 * D * D * options.persistent / tokens,
    attention=counting.scores(model.heads, K, keys),
    memories=model.heads * counting.product(shapes),
  )
  return counting.add(own, titans.flops(model, tokens))


LAYERS, WHOLE = 1, None
residual, grows = contract.around(apply), contract.bounded
