"""Samba: Mamba and sliding-window attention in turn (arXiv 2406.07522).

    even layer:  x <- x + Mamba(RMSNorm(x));       x <- x + SwiGLU(RMSNorm(x))
    odd layer:   x <- x + Attention_W(RMSNorm(x)); x <- x + SwiGLU(RMSNorm(x))

The unit that the language model stacks is a pair of layers: what stands here is
the even layer and the first half of the odd one (docs/mathematics.md 6). In the
words of Nested Learning: a memory that compresses all of the text, and one that
holds the last W tokens as they are.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import card, fields, types
from nl_jax.fields import Whole
from nl_jax.memory import rule
from nl_jax.models import cms, layers
from nl_jax.models.mixers import mamba
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.attention import softmax

if TYPE_CHECKING:
  from nl_jax.models import lm

LAYERS = 2  # Of a unit of the stack.


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


def check(model: "lm.LanguageModel") -> None:
  """Raises ValueError for heads that do not fit, odd layers, several levels."""
  layers.check_heads(model, even=True)
  if model.layers % LAYERS:
    raise ValueError(
      "model.layers must be even for model.arch='samba', whose layers are "
      f"Mamba and attention in turn, got {model.layers}"
    )
  if len(model.cms.levels) > 1:
    raise ValueError(
      "model.arch='samba' has one feed-forward level, got cms.levels="
      f"{model.cms.levels}"
    )


def _attention(model: "lm.LanguageModel") -> "lm.LanguageModel":
  """The model of the same shape all of whose layers are the odd ones."""
  window = attention.Options(
    window=model.mixer.window, implementation=model.mixer.implementation
  )
  return dataclasses.replace(model, arch="transformer", mixer=window)


def init(key: types.Array, model: "lm.LanguageModel") -> types.Params:
  """Parameters of a pair of layers.

  Returns:
    mamba, cms (the even layer's feed-forward part), attention_norm {scale
    (D,)}, attention.
  """
  mamba_key, cms_key, attention_key = jax.random.split(key, 3)
  D, depth = model.width, model.layers
  return {
    "mamba": mamba.init(mamba_key, D, depth, model.mixer.state_dim),
    "cms": cms.init(cms_key, model.cms, D, depth),
    "attention_norm": {"scale": jnp.ones((D,))},
    "attention": attention.init(attention_key, _attention(model)),
  }


def residual(
  params: types.Params,
  x_BxTxD: types.Array,
  state: SambaState | None,
  segment_ids: types.Array | None,
  *,
  model: "lm.LanguageModel",
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
  model: "lm.LanguageModel",
) -> SambaState:
  """The state of a pair at the start of a sequence; no use of `length`."""
  dtype = layers.activation_dtype(model.dtype, params)
  return SambaState(
    mamba.init_state(params["mamba"], batch_size, dtype),
    attention.init_state(
      params["attention"], batch_size, length, model=_attention(model)
    ),
  )


def alignment(model: "lm.LanguageModel") -> int:
  """1: documents may begin at any token."""
  del model
  return 1


def parameter_count(model: "lm.LanguageModel") -> int:
  """About 6.4 D² + 4 D² + 3 D F of a pair, without its last SwiGLU."""
  count = mamba.parameter_count(model.width, model.mixer.state_dim)
  count += cms.parameter_count(model.cms, model.width) + model.width
  return count + attention.parameter_count(_attention(model))


def rows(model: "lm.LanguageModel") -> list[card.Row]:
  """Mamba's memory and the window; no parameters of their own."""
  pairs = dataclasses.replace(_attention(model), layers=model.layers // LAYERS)
  window = attention.rows(pairs)[0]
  size = layers.size_of_state(model) // LAYERS
  return [
    card.Row(
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
