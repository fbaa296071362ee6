"""The language model: embedding, a scanned stack of blocks, output.

    layer:  x ← x + Mixer(RMSNorm(x));   x ← CMS(x)

then a final RMSNorm and logits against the embedding, or, untied, against a
head of its own (docs/mathematics.md 5). The mixer is the module that `MIXERS`
names, see `mixer.Mixer`; the feed-forward part of every model is a CMS, whose
case of one level is the plain block. Parameters of the layers are stacked on a
leading axis L, and one `lax.scan` runs them, rematerialised layer by layer.
A mixer may hold several layers, as `LAYERS` of its module says: then that many
are one layer here, and L counts these. Or it is `WHOLE`, a layer with a
feed-forward part of its own form: its module then also says what goes up the
layers and how their parameters are laid for the scan.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import fields, sharding, types
from nl_jax.fields import Number, OneOf, Whole
from nl_jax.kernels import splash_attention, walk
from nl_jax.levels import STEP, LevelRow
from nl_jax.models import cms, layers
from nl_jax.models import flops as counting
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.registry import MIXERS as MIXERS

# What a layer keeps that is run again in the backward pass: what its kernels
# made, which then run once.
_KEEPS = jax.checkpoint_policies.save_only_these_names(
  *walk.NAMES, splash_attention.NAME
)
# Where a config has the fields of `LanguageModel` that are not in `model`.
_GROUPS = {"sequence_length": "data", "dtype": "train", "remat": "train"}
_Size = Annotated[int, Whole(1)]
_EPSILON = layers.EPSILON
_EPSILONS = Number(1e-30, 1.0)


class LMState(NamedTuple):
  """What a model carries from call to call, apart from its weights.

  Attributes:
    layers: states of the mixers, every leaf [L,B,...].
    position_B: int32, real tokens seen, at most 2^31 - 1.
  """

  layers: Any
  position_B: types.Array


def options(arch: str, values: Mapping[str, Any] | None) -> Any:
  """The switches of an arch, from the config group `model.mixer`.

  Args:
    arch: a key of `MIXERS`.
    values: by name; groups in it are mappings. None where there is no group.

  Raises:
    ValueError: an unknown arch, a switch that it does not have, or a value
      that it does not take.
  """
  fields.check("model", LanguageModel, {"arch": arch})
  if values is None:
    return values
  return contract.filled(
    MIXERS[arch].Options, values, f"model.arch={arch!r} has no model.mixer."
  )


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A decoder-only language model; a value of shapes with pure functions.

  Attributes:
    arch: which mixer, a key of `MIXERS`.
    width: D (Table 1 has the sizes; the paper states no shape).
    layers: number of layers, L.
    heads: H, of the mixer.
    head_dim: K, key and value width of a head.
    vocab_size: rows of the embedding, at least the tokenizer's ids.
    sequence_length: slots of an unbounded attention cache by default.
    cms: the feed-forward part; one level for the plain block.
    mixer: switches of the mixer, its module's `Options`; None for archs
      without, and for attention with none on.
    dtype: dtype of activations; weights, fast weights, gates, logits and the
      loss are float32 at least.
    remat: "layer" recomputes each layer in the backward pass, but for what
      its kernels made; "none" keeps what it needs beyond the chunks.
    at_edge: whether `apply` may take it that a state stands at the edge of
      all chunks and that documents begin at edges alone, as rows of training
      do; it spares the shift to each row's grid.
    tied: the output weights are those of the embedding.
    norm_epsilon: epsilon of the norms of blocks, levels and output.
  """

  arch: Annotated[str, OneOf(*MIXERS)]
  width: _Size
  layers: _Size
  heads: _Size
  head_dim: _Size
  vocab_size: _Size
  sequence_length: _Size
  cms: cms.Options
  mixer: Any = None
  dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
  remat: Annotated[str, OneOf("layer", "none")] = "layer"
  at_edge: bool = False
  tied: bool = True
  norm_epsilon: Annotated[float, _EPSILONS] = _EPSILON

  def __post_init__(self):
    known = fields.of(LanguageModel)
    for name, value in vars(self).items():
      group = _GROUPS.get(name, "model")
      fields.check_value(f"{group}.{name}", known[name], value)
    if self.arch == "transformer" and len(self.cms.levels) > 1:
      raise ValueError(
        "model.arch='transformer' has one feed-forward level, got cms.levels="
        f"{self.cms.levels}: use model.arch='hope_attention'"
      )
    self._check_mixer()
    self.module.check(self.dims)

  def _check_mixer(self) -> None:
    wanted = self.module.Options
    if wanted is attention.Options and self.mixer is None:
      return  # All off: the attention of Transformer++.
    if type(self.mixer) is not wanted:
      raise ValueError(
        f"model.mixer belongs to model.arch={', '.join(MIXERS)}, each with "
        f"switches of its own, got arch={self.arch!r} with "
        f"mixer={self.mixer!r}"
      )

  @property
  def module(self) -> contract.Mixer:
    """The module of the mixer's functions."""
    return MIXERS[self.arch]

  @property
  def dims(self) -> contract.Dims:
    """What a mixer sees of the model."""
    return contract.Dims(
      self.arch, self.width, self.layers, self.heads, self.head_dim,
      self.sequence_length, self.cms, self.mixer, self.dtype, self.at_edge,
      self.norm_epsilon,
    )  # fmt: skip

  @property
  def units(self) -> int:
    """Length of the stack: layers, or groups of them where a mixer is one."""
    return self.layers // self.module.LAYERS

  @property
  def whole(self) -> bool:
    """Whether the mixer is all of a layer, its feed-forward part included."""
    return self.module.WHOLE is not None

  @property
  def grows(self) -> bool:
    """Whether the state has an unbounded cache, of `length` slots."""
    return self.module.grows(self.dims)

  @property
  def alignment(self) -> int:
    """Documents of a packed row must begin at multiples of this."""
    return self.module.alignment(self.dims)

  def leaves(self) -> leaf.Leaves:
    """The table of the parameters, those of `blocks` stacked [L,...].

    {embed, blocks: {mixer_norm, mixer, cms}, final_norm}, and `head` (D,Vocab)
    where the output is not tied.
    """
    D, vocabulary = self.width, self.vocab_size
    embed = leaf.kernel((vocabulary, D), ("vocab", "embed"), 0)
    block = {"mixer_norm/scale": leaf.scale(D, "act_embed")}
    block |= leaf.under("mixer", self.module.leaves(self.dims), 0)
    if not self.whole:
      block |= leaf.under("cms", cms.leaves(self.cms, D, self.layers), 1)
    made = {
      "embed": dataclasses.replace(embed, matrix=False),
      **leaf.stacked(leaf.under("blocks", block), self.units, 1),
      "final_norm/scale": leaf.scale(D, "act_embed"),
    }
    if not self.tied:
      head = leaf.kernel((D, vocabulary), ("embed", "vocab"), 0)
      # A key that no tied model draws from: its numbers stay.
      made["head"] = dataclasses.replace(head, matrix=False, key=(0, 0))
    return made

  def axes(self) -> dict[str, tuple[str, ...]]:
    """The logical axes of the parameters by path."""
    return leaf.axes(self.leaves())

  def init(self, key: types.Array) -> types.Params:
    """The parameters, a plain nested dict; see `leaves`."""
    return leaf.drawn(self.leaves(), key)

  def laid(self, blocks: types.Params) -> types.Params:
    """The blocks with leaves [L,...] all."""
    whole = self.module.WHOLE
    if whole is None:
      return blocks
    return {**blocks, "mixer": whole.laid(blocks["mixer"])}

  def enter(self, x_BxTxD: types.Array) -> Any:
    """What goes up the layers, from the residual stream."""
    whole = self.module.WHOLE
    return x_BxTxD if whole is None else whole.enter(x_BxTxD)

  def leave(self, stream: Any) -> types.Array:
    """The residual stream, from what goes up the layers."""
    whole = self.module.WHOLE
    return stream if whole is None else whole.leave(stream)

  def init_state(
    self, params: types.Params, batch_size: int, length: int | None = None
  ) -> LMState:
    """The state at the start of a sequence.

    Args:
      params: of `init`; memories start from a copy of what is learned there.
      batch_size: B.
      length: slots of an unbounded cache; `sequence_length` by default.
    """
    slots = self.sequence_length if length is None else length
    dims = self.dims
    start = lambda p: self.module.init_state(p, batch_size, slots, model=dims)
    stacked = jax.vmap(start)(self.laid(params["blocks"])["mixer"])
    return LMState(stacked, jnp.zeros((batch_size,), jnp.int32))

  def apply(
    self,
    params: types.Params,
    tokens_BxT: types.Array,
    state: LMState | None = None,
    *,
    segment_ids: types.Array | None = None,
    learn: types.Array | None = None,
  ) -> tuple[types.Array, LMState, dict[str, Any]]:
    """Logits of the next token, for training, prefill and decoding alike.

    Args:
      params: of `init`.
      tokens_BxT: int32 ids.
      state: of the call before; None is the start of a sequence, with room
        for T tokens.
      segment_ids: int32 [B,T], the document of each token, 0 is padding; None:
        all continue with the document of the state.
      learn: which losses enter in-context updates; without effect here, where
        no level learns from the task loss.

    Returns:
      logits [B,T,Vocab] in float32 at least, the state after the call, and
      metrics: for each memory level sums over real tokens, leaves [L,B,H].
    """
    del learn
    if segment_ids is not None:
      segment_ids = jnp.asarray(segment_ids, jnp.int32)
      # Documents are counted along whole rows, before any layer.
      segment_ids = sharding.whole_rows(segment_ids)
    dtype = layers.activation_dtype(self.dtype, params)
    x_BxTxD = params["embed"].astype(dtype)[tokens_BxT]
    carried = None if state is None else state.layers
    x_BxTxD, stacked, metrics = self.stack(
      params["blocks"], x_BxTxD, carried, segment_ids
    )
    logits = self.logits(params, x_BxTxD)
    seen = count_real(tokens_BxT, segment_ids)
    before = jnp.zeros_like(seen) if state is None else state.position_B
    return logits, LMState(stacked, counted(before, seen)), metrics

  @jax.named_scope("output")
  def logits(self, params: types.Params, x_BxTxD: types.Array) -> types.Array:
    """Logits [B,T,Vocab] of the residual stream, in float32 at least."""
    dtype = x_BxTxD.dtype
    scale = params["final_norm"]["scale"]
    x_BxTxD = layers.rms_norm(x_BxTxD, scale, self.norm_epsilon)
    head = params["embed"] if self.tied else params["head"]
    return jnp.einsum(
      "btd,vd->btv" if self.tied else "btd,dv->btv",
      x_BxTxD,
      head.astype(dtype),
      preferred_element_type=layers.at_least_float32(dtype),
    )

  def stack(
    self,
    blocks: types.Params,
    x_BxTxD: types.Array,
    carried: Any,
    segment_ids: types.Array | None,
  ) -> tuple[types.Array, Any, dict[str, Any]]:
    """Layers as one scan; outputs are activations and states only.

    Args:
      blocks: of `init`, leaves [L,...], or some of its layers.
      x_BxTxD: the residual stream.
      carried: states of these layers, or None.
      segment_ids: as in `apply`.

    Returns:
      The residual stream, the states and the metrics, leaves [L,...].
    """

    def body(x, layer):
      # Told its place, XLA gathers weights instead of summing activations.
      place = lambda x: sharding.constrain(x, "batch", "length", "act_embed")
      x = jax.tree.map(place, x)
      x, state, metrics = self.block(*layer, x, segment_ids)
      return x, (state, metrics)

    if self.remat == "layer":
      # A scan already keeps XLA from merging the recomputation.
      body = jax.checkpoint(body, prevent_cse=False, policy=_KEEPS)
    stream = self.enter(x_BxTxD)
    blocks = self.laid(blocks)
    count = jax.tree.leaves(blocks)[0].shape[0]
    if carried is not None and x_BxTxD.shape[1] == 1 and count:
      stream, states, metrics = _in_place(body, stream, blocks, carried)
    else:
      with walk.kept(self.units):
        stream, (states, metrics) = jax.lax.scan(
          body, stream, (blocks, carried)
        )
    return self.leave(stream), states, metrics

  def block(
    self,
    params: types.Params,
    state: Any,
    x_BxTxD: types.Array,
    segment_ids: types.Array | None = None,
  ) -> tuple[types.Array, Any, dict[str, Any]]:
    """One layer: x + Mixer(RMSNorm(x)), then the CMS.

    Args:
      params: one layer of `params["blocks"]`.
      state: one layer of the mixers' states, or None.
      x_BxTxD: the residual stream.
      segment_ids: as in `apply`.
    """
    x_BxTxD, state, metrics = self.mix(params, x_BxTxD, state, segment_ids)
    if not self.whole:
      x_BxTxD = cms.apply(params["cms"], x_BxTxD, self.cms, self.norm_epsilon)
    return x_BxTxD, state, metrics

  @jax.named_scope("mixer")
  def mix(
    self,
    params: types.Params,
    x_BxTxD: types.Array,
    state: Any,
    segment_ids: types.Array | None,
  ) -> tuple[types.Array, Any, dict[str, Any]]:
    """The mixer of one layer around its norm, or what is its `residual`."""
    return self.module.residual(
      params, x_BxTxD, state, segment_ids, model=self.dims
    )

  def parameter_count(self) -> int:
    """Parameters of the whole model."""
    return leaf.count(self.leaves())

  def flops(self, tokens: int) -> counting.Flops:
    """FLOPs of a token in the forward pass, in a sequence of `tokens`."""
    layers = counting.Flops(*(self.units * x for x in self.unit_flops(tokens)))
    return layers._replace(output=2.0 * self.vocab_size * self.width)

  def unit_flops(self, tokens: int) -> counting.Flops:
    """Those of one layer, or of what the stack has in place of one."""
    mixer = self.module.flops(self.dims, tokens)
    if self.whole:
      return mixer
    feed_forward = counting.feed_forward(self.cms, self.width)
    return counting.add(mixer, counting.Flops(feed_forward=feed_forward))

  def levels(
    self,
  ) -> tuple[list[LevelRow], Callable[[types.Params], types.Params]]:
    """The rows of the level card, and the function that labels parameters.

    The labels are level names in a tree like the parameters': "cms/<level>"
    for a CMS of several levels, else "slow".
    """
    mixer_rows = self.module.levels(self.dims)
    cms_rows = self._cms_rows()
    slow = self.parameter_count()
    slow -= sum(row.parameters for row in (*mixer_rows, *cms_rows))
    names = "projections" if cms_rows else "projections and FFN"
    slow_row = LevelRow(
      name=f"slow weights ({names})",
      kind="slow weights",
      chunk=STEP,
      parameters=slow,
      frozen=True,
    )
    return [*mixer_rows, *cms_rows, slow_row], self._labels

  def _cms_rows(self) -> list[LevelRow]:
    """A row a level; none for one level, which is part of the slow weights."""
    config = self.cms
    if len(config.levels) == 1:
      return []
    norm = self.width if config.norm else 0
    return [
      LevelRow(
        name=f"{name} FFN",
        kind="feed-forward",
        chunk=period or STEP,
        transfer="init" if config.variant == "nested" else "backprop",
        parameters=self.layers * (3 * self.width * hidden + norm),
      )
      for name, hidden, period in zip(
        config.levels, config.widths, config.periods
      )
    ]

  def _labels(self, params: types.Params) -> types.Params:
    name = lambda path, _: cms.label(path, self.cms)
    return jax.tree_util.tree_map_with_path(name, params)


def _in_place(
  body: Callable[..., Any], stream: Any, blocks: types.Params, states: Any
) -> tuple[Any, Any, Any]:
  """Layers of one token: each writes its state where it stood.

  As outputs of a scan the new states stand beside the old ones, which a token
  then copies. Args and results are as of a scan of `body`.
  """

  def step(carry: Any, layer: Any) -> tuple[Any, Any]:
    stream, states = carry
    params, i = layer
    take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
    stream, (state, metrics) = body(
      stream, (params, jax.tree.map(take, states))
    )
    return (stream, jax.tree.map(put, states, state)), metrics

  places = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])
  (stream, states), metrics = jax.lax.scan(
    step, (stream, states), (blocks, places)
  )
  return stream, states, metrics


def at_edges(model: Any) -> Any:
  """The model as rows of training are read by it, see `at_edge`.

  One without that promise stays as it is.
  """
  known = dataclasses.fields(model) if dataclasses.is_dataclass(model) else ()
  if "at_edge" not in [field.name for field in known]:
    return model
  return dataclasses.replace(model, at_edge=True)


def batch_axis(path: Any) -> int:
  """Of a leaf of a state: those of layers are [L,B,...], others [B,...]."""
  return 1 if path[0].name == "layers" else 0


def count_real(
  tokens_BxT: types.Array, segment_ids: types.Array | None
) -> types.Array:
  """[B] real tokens of a call."""
  if segment_ids is None:
    batch, tokens = tokens_BxT.shape
    return jnp.full((batch,), tokens, jnp.int32)
  return jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32)


def counted(before_B: types.Array, seen_B: types.Array) -> types.Array:
  """int32 [B], the sum; at 2^31 - 1 it stands still, so that it never wraps.

  Nothing that a model computes reads the counter.
  """
  after = before_B + seen_B
  return jnp.where(after < before_B, jnp.iinfo(jnp.int32).max, after)
