"""Named models: families, their sizes of Table 1, and two small ones.

`hope_1b3` is the family `hope` at the size `1b3`; `hope_1b3:smoke` its test
size, and `hope_1b3:paper` the paper's literal reading. `group` gives what such
a model says in the group `model` of a config, where it is not a default.

All models of a size have the same depth and width and, by the width of their
feed-forward part, the same number of parameters: within 3 % of the nominal
size and 3.5 % of each other (docs/mathematics.md 7). The paper states none
of these shapes but the nominal sizes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nl_jax import fields


class Scale(NamedTuple):
  """What all models of a size share.

  Attributes:
    parameters: nominal, of Table 1; 0 for the small sizes, which are ours.
    layers: L.
    width: D.
    vocab_size: entries of the embedding.
    sequence_length: tokens of a row.
    remat: as `lm.LanguageModel` has it.
    periods: tokens between two updates of the levels high, mid and low.
    chunks: tokens between two updates of high and mid, learning in context.
  """

  parameters: int
  layers: int
  width: int
  vocab_size: int
  sequence_length: int
  remat: str
  periods: tuple[int, int, int]
  chunks: tuple[int, int]


class Shape(NamedTuple):
  """A model at a size.

  Attributes:
    heads: H.
    head_dim: K.
    widths: F of each feed-forward level, fastest first: one, or high, mid, low.
    mixer: options of the mixer at this size. The small sizes keep the states of
      all chunks: memory does not matter there.
  """

  heads: int
  head_dim: int
  widths: tuple[int, ...]
  mixer: Mapping[str, Any] = {}


class Family(NamedTuple):
  """A model in all sizes.

  Attributes:
    arch: a key of `lm.MIXERS`.
    shapes: a key of `SHAPES`.
    mixer: options of the mixer at every size.
    in_context: whether levels learn in context.
    words: families that a word after the colon of a name asks for.
  """

  arch: str
  shapes: str
  mixer: Mapping[str, Any] = {}
  in_context: bool = False
  words: Mapping[str, str] = {}


_PAPER = ((2**20, 2**22, 2**24), (512, 2048))
SCALES = {
  "smoke": Scale(0, 2, 64, 320, 64, "none", (512, 2048, 8192), (8, 32)),
  "tiny": Scale(0, 2, 128, 320, 256, "none", (2048, 8192, 32768), (32, 128)),
  "340m": Scale(340_000_000, 24, 1024, 32_000, 4096, "layer", *_PAPER),
  "760m": Scale(760_000_000, 24, 1536, 32_000, 4096, "layer", *_PAPER),
  "1b3": Scale(1_300_000_000, 24, 2048, 32_000, 4096, "layer", *_PAPER),
}
_TEST = "smoke"
# Inner widths of RWKV-7's LoRAs where they are not the authors'.
_RANKS = ("decay_rank", "rate_rank", "value_rank", "gate_rank")


def _hope(
  heads: int,
  head_dim: int,
  width: int,
  *,
  hidden: int,
  chunk: int,
  remat_group: int = 4,
) -> Shape:
  """HOPE's: levels of one width, and one chunk for all memories."""
  mixer = dict(hidden=hidden, chunk_memory=chunk, chunk_gen=chunk)
  return Shape(
    heads, head_dim, (width,) * 3, dict(mixer, remat_group=remat_group)
  )


SHAPES = {
  "transformer": {
    "smoke": Shape(4, 16, (172,)),
    "tiny": Shape(4, 32, (348,)),
    "340m": Shape(16, 64, (2816,)),
    "760m": Shape(12, 128, (4352,)),
    "1b3": Shape(16, 128, (5632,)),
  },
  "hope_attention": {
    "smoke": Shape(4, 16, (56,) * 3),
    "tiny": Shape(4, 32, (116,) * 3),
    "340m": Shape(16, 64, (960,) * 3),
    "760m": Shape(12, 128, (1472,) * 3),
    "1b3": Shape(16, 128, (1856,) * 3),
  },
  # With a window; the parameters are those of hope_attention.
  "hope_attention_incontext": {
    "smoke": Shape(4, 16, (56,) * 3, dict(window=16)),
    "tiny": Shape(4, 32, (116,) * 3, dict(window=64)),
    "340m": Shape(16, 64, (960,) * 3, dict(window=1024)),
    "760m": Shape(12, 128, (1472,) * 3, dict(window=1024)),
    "1b3": Shape(16, 128, (1856,) * 3, dict(window=1024)),
  },
  # Heads of 256, V = 2 K; here too the chunk changes no number.
  "retnet": {
    "smoke": Shape(4, 16, (86,), dict(chunk=8, remat_group=1)),
    "tiny": Shape(4, 32, (176,), dict(chunk=16, remat_group=1)),
    "340m": Shape(4, 256, (1408,), dict(chunk=64)),
    "760m": Shape(6, 256, (2304,), dict(chunk=64)),
    "1b3": Shape(8, 256, (2880,), dict(chunk=64)),
  },
  # F is of two matrices; the chunk changes no number.
  "rwkv7": {
    "smoke": Shape(
      4, 16, (214,), dict(zip(_RANKS, (8, 8, 4, 16)), chunk=8, remat_group=1)
    ),
    "tiny": Shape(
      4, 32, (442,), dict(zip(_RANKS, (16, 16, 8, 32)), chunk=16, remat_group=1)
    ),
    "340m": Shape(16, 64, (3904,), dict(chunk=64)),
    "760m": Shape(24, 64, (6272,), dict(chunk=64)),
    "1b3": Shape(32, 64, (8192,), dict(chunk=64)),
  },
  # Mamba and attention in turn, a feed-forward part after each.
  "samba": {
    "smoke": Shape(4, 16, (128,), dict(chunk=8, window=16)),
    "tiny": Shape(4, 32, (280,), dict(chunk=8, window=64)),
    "340m": Shape(16, 64, (2368,), dict(chunk=64, window=2048)),
    "760m": Shape(12, 128, (3776,), dict(chunk=64, window=2048)),
    "1b3": Shape(16, 128, (4864,), dict(chunk=64, window=2048)),
  },
  # The chunk is not part of the delta rule: it says what is computed at once.
  "deltanet": {
    "smoke": Shape(4, 16, (170,), dict(chunk=8, remat_group=1)),
    "tiny": Shape(4, 32, (344,), dict(chunk=16, remat_group=1)),
    "340m": Shape(8, 128, (2816,), dict(chunk=64)),
    "760m": Shape(12, 128, (4352,), dict(chunk=64)),
    "1b3": Shape(16, 128, (5632,), dict(chunk=64)),
  },
  # HK = 3/4 D and V = 2 K, as the authors of both have it.
  "gated_deltanet": {
    "smoke": Shape(3, 16, (124,), dict(chunk=8, value_dim=32, remat_group=1)),
    "tiny": Shape(3, 32, (254,), dict(chunk=16, value_dim=64, remat_group=1)),
    "340m": Shape(6, 128, (2112,), dict(chunk=64, value_dim=256)),
    "760m": Shape(9, 128, (3328,), dict(chunk=64, value_dim=256)),
    "1b3": Shape(12, 128, (4288,), dict(chunk=64, value_dim=256)),
  },
  # Heads of Gated DeltaNet; its ranks are 128 where they are not said.
  "gated_deltanet2": {
    "smoke": Shape(
      3,
      16,
      (98,),
      dict(chunk=8, value_dim=32, decay_rank=8, gate_rank=8, remat_group=1),
    ),
    "tiny": Shape(
      3,
      32,
      (202,),
      dict(chunk=16, value_dim=64, decay_rank=16, gate_rank=16, remat_group=1),
    ),
    "340m": Shape(6, 128, (1664,), dict(chunk=64, value_dim=256)),
    "760m": Shape(9, 128, (2752,), dict(chunk=64, value_dim=256)),
    "1b3": Shape(12, 128, (3584,), dict(chunk=64, value_dim=256)),
  },
  # Heads of 64, M = 4 K and C = 16 are those of its authors.
  "ttt_linear": {
    "smoke": Shape(4, 16, (162,), dict(chunk=8, remat_group=1)),
    "tiny": Shape(4, 32, (334,), dict(chunk=16, remat_group=1)),
    "340m": Shape(16, 64, (2752,), dict(chunk=16)),
    "760m": Shape(24, 64, (4352,), dict(chunk=16)),
    "1b3": Shape(32, 64, (5632,), dict(chunk=16)),
  },
  "ttt_mlp": {
    "smoke": Shape(4, 16, (120,), dict(hidden=64, chunk=8, remat_group=1)),
    "tiny": Shape(4, 32, (256,), dict(hidden=128, chunk=16, remat_group=1)),
    "340m": Shape(16, 64, (2624,), dict(hidden=256, chunk=16)),
    "760m": Shape(24, 64, (4224,), dict(hidden=256, chunk=16)),
    "1b3": Shape(32, 64, (5440,), dict(hidden=256, chunk=16)),
  },
  # K = 128, M = K, C = 64, at the small sizes M = 2 K, C = 16: of the same
  # parameters and state, K = 64, M = 2 K, C = 16 has three times the bundles
  # (docs/kernels.md).
  "titans_lmm": {
    "smoke": Shape(4, 16, (128,), dict(hidden=32, chunk=8, remat_group=1)),
    "tiny": Shape(4, 32, (258,), dict(hidden=64, chunk=16, remat_group=1)),
    "340m": Shape(8, 128, (2368,), dict(hidden=128, chunk=64)),
    "760m": Shape(12, 128, (3776,), dict(hidden=128, chunk=64)),
    "1b3": Shape(16, 128, (4864,), dict(hidden=128, chunk=64)),
  },
  # C = 16 (Miras: 16 or 64): it has no kernel, which a longer chunk would fill.
  "memora": {
    "smoke": Shape(
      4, 16, (90,), dict(hidden=32, chunk=8, rank=32, remat_group=1)
    ),
    "tiny": Shape(
      4, 32, (218,), dict(hidden=64, chunk=16, rank=32, remat_group=1)
    ),
    "340m": Shape(16, 64, (2304,), dict(hidden=128, chunk=16, rank=64)),
    "760m": Shape(24, 64, (3648,), dict(hidden=128, chunk=16, rank=64)),
    "1b3": Shape(32, 64, (4800,), dict(hidden=128, chunk=16, rank=64)),
  },
  # Attention beside the memory; M = 2 K. K = 64, M = 4 K, C = 16 has four
  # times the bundles.
  "titans_mag": {
    "smoke": Shape(
      4, 16, (36,), dict(hidden=32, chunk=8, window=16, remat_group=1)
    ),
    "tiny": Shape(
      4, 32, (82,), dict(hidden=64, chunk=16, window=64, remat_group=1)
    ),
    "340m": Shape(8, 128, (896,), dict(hidden=256, chunk=64, window=1024)),
    "760m": Shape(12, 128, (1600,), dict(hidden=256, chunk=64, window=1024)),
    "1b3": Shape(16, 128, (2048,), dict(hidden=256, chunk=64, window=1024)),
  },
  # Here a window is a section.
  "titans_mac": {
    "smoke": Shape(
      4, 16, (36,), dict(hidden=32, chunk=8, segment=16, remat_group=1)
    ),
    "tiny": Shape(
      4, 32, (82,), dict(hidden=64, chunk=16, segment=64, remat_group=1)
    ),
    "340m": Shape(8, 128, (896,), dict(hidden=256, chunk=64, segment=1024)),
    "760m": Shape(12, 128, (1600,), dict(hidden=256, chunk=64, segment=1024)),
    "1b3": Shape(16, 128, (2048,), dict(hidden=256, chunk=64, segment=1024)),
  },
  # K = 128, M = K, C = 64: the parameters and state of K = 64, M = 2K at half
  # the time of a step (docs/mathematics.md 9).
  "hope": {
    "smoke": _hope(4, 16, 32, hidden=32, chunk=8, remat_group=1),
    "tiny": _hope(4, 32, 64, hidden=32, chunk=16, remat_group=1),
    "340m": _hope(8, 128, 704, hidden=128, chunk=64),
    "760m": _hope(12, 128, 1152, hidden=128, chunk=64),
    "1b3": _hope(16, 128, 1536, hidden=128, chunk=64),
  },
  # The chunk length of camera-ready Fig. 3.
  "hope_paper": {
    "smoke": _hope(4, 16, 32, hidden=32, chunk=8, remat_group=1),
    "tiny": _hope(4, 32, 28, hidden=64, chunk=16, remat_group=1),
    "340m": _hope(16, 64, 704, hidden=128, chunk=16),
    "760m": _hope(24, 64, 1152, hidden=128, chunk=16),
    "1b3": _hope(32, 64, 1536, hidden=128, chunk=16),
  },
  # K = 128, C = 64 here too: the walk has half the bundles of K = 64, C = 16
  # (docs/kernels.md), and a state twice as large. F at 1b3 is that of hope,
  # whole tiles of 128.
  "hope_linear": {
    "smoke": _hope(4, 16, 40, hidden=0, chunk=8, remat_group=1),
    "tiny": _hope(4, 32, 82, hidden=0, chunk=16, remat_group=1),
    "340m": _hope(8, 128, 768, hidden=0, chunk=64),
    "760m": _hope(12, 128, 1216, hidden=0, chunk=64),
    "1b3": _hope(16, 128, 1536, hidden=0, chunk=64),
  },
}

FAMILIES = {
  "hope": Family("hope", "hope", words={"paper": "hope_paper"}),
  # Every switch at its literal reading.
  "hope_paper": Family(
    "hope",
    "hope_paper",
    dict(
      dgd_scope="input_layer",  # The only shape-literal reading of eq. 88.
      dgd_coef="raw",  # Eq. 88: eta itself.
      erase_of="whole",  # Eq. 88: the erase acts on the whole weight.
      read="chunk_start",  # Eq. 90.
      value_source="self",  # Eq. 84, of M_memory too.
      value_norm="target",  # A stabiliser: NaN without (docs/mathematics.md 9).
      # eta starts at 0.05, unstated in the paper: from 0.5 the raw erase of the
      # input layer alone is NaN at the third step of the tiny model.
      eta_bias=-3.0,
      generators=dict(rate=1.0),  # They learn as fast as M_memory.
    ),
  ),
  # Choices of docs/mathematics.md 9.
  "hope_linear": Family(
    "hope",
    "hope_linear",
    dict(
      memory="linear",  # A matrix K x K.
      residual=False,  # M_memory: read is q W.
      objective="dot",  # With the raw erase: the delta rule.
      dgd_coef="raw",  # Eq. 88: eta itself.
      residual_clip=0.0,  # The delta rule is bounded without.
    ),
  ),
  "hope_incontext": Family("hope", "hope", in_context=True),
  "hope_attention": Family("hope_attention", "hope_attention"),
  "hope_attention_incontext": Family(
    "hope_attention", "hope_attention_incontext", in_context=True
  ),
  "transformer": Family("transformer", "transformer"),
  "retnet": Family("retnet", "retnet"),
  "rwkv7": Family("rwkv7", "rwkv7"),
  "samba": Family("samba", "samba"),
  "deltanet": Family("deltanet", "deltanet"),
  "gated_deltanet": Family(
    "gated_deltanet", "gated_deltanet", dict(output_gate=True)
  ),
  "gated_deltanet2": Family("gated_deltanet2", "gated_deltanet2"),
  "comba": Family(
    "comba", "gated_deltanet", dict(output_gate=True, correction=1.0)
  ),
  "ttt_linear": Family("ttt_linear", "ttt_linear"),
  "ttt_mlp": Family("ttt_mlp", "ttt_mlp", dict(base_lr=0.1)),
  "titans_lmm": Family("titans_lmm", "titans_lmm"),
  "titans_mac": Family("titans_mac", "titans_mac"),
  "titans_mag": Family("titans_mag", "titans_mag"),
  "titans_mal": Family("titans_mal", "titans_mag"),
  "dla": Family("dla", "titans_lmm"),
  "memora": Family("memora", "memora"),
}


def names() -> list[str]:
  """The names of all models but those that a word asks for, sorted."""
  asked = {x for family in FAMILIES.values() for x in family.words.values()}
  return sorted(
    f"{family}_{size}"
    for family in FAMILIES
    for size in SCALES
    if family not in asked and size != _TEST
  )


def parse(name: str) -> tuple[str, str]:
  """The keys of `FAMILIES` and `SCALES` of a model's name.

  Args:
    name: one of `names`, perhaps with a colon and words with commas between:
      hope_1b3, hope_tiny:smoke, hope_340m:paper.

  Raises:
    ValueError: no such name or word.
  """
  stem, _, words = name.partition(":")
  if stem not in names():
    raise ValueError(
      f"no config named {stem!r}. {fields.near(stem, names())}Known: "
      f"{', '.join(names())}"
    )
  family, _, size = stem.rpartition("_")
  return chosen(family, size, words)


def chosen(family: str, size: str, words: str) -> tuple[str, str]:
  """Family and size as words ask for them.

  Args:
    family: a key of `FAMILIES`.
    size: a key of `SCALES`.
    words: with commas between: smoke, and those of the family.

  Raises:
    ValueError: an unknown word.
  """
  known = FAMILIES[family].words
  for word in words.split(",") if words else ():
    if word == _TEST:
      size = _TEST
    elif word in known:
      family = known[word]
    else:
      raise ValueError(
        f"unknown config argument {word!r}; known: {', '.join((_TEST, *known))}"
      )
  return family, size


def group(family: str, size: str) -> dict[str, Any]:
  """The group `model` of a config, without what is a default.

  Args:
    family: a key of `FAMILIES`.
    size: a key of `SCALES`.
  """
  made, scale = FAMILIES[family], SCALES[size]
  shape = SHAPES[made.shapes][size]
  cms: dict[str, Any] = dict(widths=shape.widths)
  if len(shape.widths) > 1:
    cms |= dict(levels=("high", "mid", "low"), periods=scale.periods)
  if made.in_context:
    # The starts of all levels learn in each step.
    cms |= dict(periods=(0, 0, 0), chunks=scale.chunks)
    cms |= dict(fast_levels=("high", "mid"), rates=(0.1, 0.1))
  return dict(
    arch=made.arch,
    width=scale.width,
    layers=scale.layers,
    heads=shape.heads,
    head_dim=shape.head_dim,
    vocab_size=scale.vocab_size,
    mixer={**shape.mixer, **made.mixer},
    cms=cms,
  )
