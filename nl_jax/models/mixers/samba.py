"""Samba: Mamba and sliding-window attention in turn (arXiv 2406.07522).

    even layer:  x <- x + Mamba(RMSNorm(x));       x <- x + SwiGLU(RMSNorm(x))
    odd layer:   x <- x + Attention_W(RMSNorm(x)); x <- x + SwiGLU(RMSNorm(x))

The unit that the language model stacks is a pair of layers: what stands here is
the even layer and the first half of the odd one (docs/mathematics.md 6). In the
words of Nested Learning: a memory that compresses all of the text, and one that
holds the last W tokens as they are.
"""

import dataclasses
from typing import Annotated, NamedTuple

from nl_jax import fields, types
from nl_jax.fields import Whole
from nl_jax.levels import LevelRow
from nl_jax.memory import rule
from nl_jax.models import cms, layers
from nl_jax.models import flops as counting
from nl_jax.models import leaves as leaf
from nl_jax.models import mixer as contract
from nl_jax.models.mixers import mamba
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.attention import softmax


@dataclasses.dataclass(frozen=True)
class Options:
  """The switches.

  Attributes:
    window: W, tokens that each token sees, itself included.
    state_dim: N, numbers that Mamba holds a channel.
    chunk: tokens that Mamba computes at once; changes no number.
    implementation: what runs attention without a cache: "auto" (by the
      platform), "xla", "pallas_tpu", "pallas_interpret", "cudnn", see
      `attention.Options`.
    walk: what runs Mamba's walk over chunks: "auto" (the kernels on a TPU
      where they can), "xla", "pallas_tpu", "pallas_interpret".
  """

  window: Annotated[int, Whole(2)] = 2048
  state_dim: rule.Count = 16
  chunk: rule.Count = 64
  implementation: softmax.Implementation = "auto"
  walk: rule.Walk = "auto"

  def __post_init__(self):
    fields.check("model.mixer", Options, vars(self))


class SambaState(NamedTuple):
  """What a pair of layers carries from call to call; it does not grow.

  Attributes:
    mamba: of the even layer.
    attention: the last W-1 tokens of the odd layer.
  """

  mamba: mamba.MambaState
  attention: attention.AttentionState


def check(model: contract.Dims) -> None:
  """Raises ValueError for heads that do not fit, odd layers, several levels."""
  contract.check_heads(model, even=True)
  if model.layers % 2:
    raise ValueError(
      "model.layers must be even for model.arch='samba', whose layers are "
      f"Mamba and attention in turn, got {model.layers}"
    )
  if len(model.cms.levels) > 1:
    raise ValueError(
      "model.arch='samba' has one feed-forward level, got cms.levels="
      f"{model.cms.levels}"
    )


def _attention(model: contract.Dims) -> contract.Dims:
  """The model of the same shape all of whose layers are the odd ones."""
  window = attention.Options(
    window=model.mixer.window, implementation=model.mixer.implementation
  )
  return dataclasses.replace(model, arch="transformer", mixer=window)


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of a pair of layers.

  mamba, cms (the even layer's feed-forward part), attention_norm {scale (D,)},
  attention.
  """
  D, depth = model.width, model.layers
  even = mamba.leaves(D, depth, model.mixer.state_dim)
  return {
    **leaf.under("mamba", even, 0),
    **leaf.under("cms", cms.leaves(model.cms, D, depth), 1),
    "attention_norm/scale": leaf.scale(D, "act_embed"),
    **leaf.under("attention", attention.leaves(_attention(model)), 2),
  }


def residual(
  params: types.Params,
  x_BxTxD: types.Array,
  state: SambaState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, SambaState, dict]:
  """A pair of layers but for the last feed-forward part.

  Args:
    params: mixer_norm and mixer of one unit.
    x_BxTxD: the residual stream.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    model: shapes and switches.

  Returns:
    x_BxTxD, the state after the call, and no metrics.
  """
  mixer, epsilon = params["mixer"], model.norm_epsilon
  even, odd = (None, None) if state is None else state
  normed = layers.rms_norm(x_BxTxD, params["mixer_norm"]["scale"], epsilon)
  y_BxTxD, even = mamba.apply(
    mixer["mamba"], normed, even, segment_ids,
    chunk=model.mixer.chunk, walk=model.mixer.walk,
  )  # fmt: skip
  x_BxTxD = cms.apply(mixer["cms"], x_BxTxD + y_BxTxD, model.cms, epsilon)
  normed = layers.rms_norm(x_BxTxD, mixer["attention_norm"]["scale"], epsilon)
  y_BxTxD, odd, metrics = attention.apply(
    mixer["attention"], normed, odd, segment_ids, model=_attention(model)
  )
  return x_BxTxD + y_BxTxD, SambaState(even, odd), metrics


def init_state(
  params: types.Params,
  batch_size: int,
  length: int,
  *,
  model: contract.Dims,
) -> SambaState:
  """The state of a pair at the start of a sequence; no use of `length`."""
  dtype = layers.activation_dtype(model.dtype, params)
  return SambaState(
    mamba.init_state(params["mamba"], batch_size, dtype),
    attention.init_state(
      params["attention"], batch_size, length, model=_attention(model)
    ),
  )


def levels(model: contract.Dims) -> list[LevelRow]:
  """Mamba's memory and the window; no parameters of their own."""
  pairs = dataclasses.replace(_attention(model), layers=model.layers // 2)
  window = attention.levels(pairs)[0]
  size = contract.state_bytes(leaves(model), init_state, model) // 2
  return [
    LevelRow(
      name="Mamba",
      kind="memory",
      chunk=1,
      bptt=None,
      objective="dot",
      rule="GD, retention",
      transfer="parametric",
      state_bytes=size - window.state_bytes,
    ),
    dataclasses.replace(window, name=f"attention to {model.mixer.window}"),
  ]


def flops(model: contract.Dims, tokens: int) -> counting.Flops:
  """FLOPs of a token in a pair, without its last feed-forward part."""
  D, N = model.width, model.mixer.state_dim
  inner, R = mamba.EXPAND * D, mamba.rank(D)
  keys = min(model.mixer.window, tokens)
  return counting.Flops(
    projections=2.0 * inner * (3 * D + 2 * R + 2 * N) + 8.0 * D * D,
    attention=counting.scores(model.heads, model.head_dim, keys),
    # A memory of N numbers a channel: u v is written, and read.
    memories=4.0 * inner * N,
    feed_forward=counting.feed_forward(model.cms, D),
  )


LAYERS, WHOLE = 2, None
starts, alignment, grows = contract.empty, contract.anywhere, contract.bounded
