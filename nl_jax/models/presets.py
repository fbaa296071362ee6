"""The named shapes of Table 1, and two small ones (docs/mathematics.md 7).

All models of a scale have the same depth and width and, by the width of their
feed-forward part, the same number of parameters: within 3 % of the nominal
size and 3.5 % of each other. The paper states none of these shapes but the
nominal sizes.
"""

from typing import NamedTuple


class Scale(NamedTuple):
  """What all models of a scale share.

  Attributes:
    parameters: nominal, of Table 1; 0 for the small sizes, which are ours.
    layers: L.
    width: D.
    vocab_size: entries of the embedding.
  """

  parameters: int
  layers: int
  width: int
  vocab_size: int


class Shape(NamedTuple):
  """A model at a scale.

  Attributes:
    heads: H.
    head_dim: K.
    widths: F of each feed-forward level, fastest first.
    hidden: M of an MLP memory; 0 where there is none.
    chunk: tokens a chunk of a memory; 0 where there is none.
    value_dim: V where it is not K; else 0.
    window: tokens that attention sees where it does not see all; else 0.
  """

  heads: int
  head_dim: int
  widths: tuple[int, ...]
  hidden: int = 0
  chunk: int = 0
  value_dim: int = 0
  window: int = 0


SCALES = {
  "smoke": Scale(0, 2, 64, 320),
  "tiny": Scale(0, 2, 128, 320),
  "340m": Scale(340_000_000, 24, 1024, 32_000),
  "760m": Scale(760_000_000, 24, 1536, 32_000),
  "1b3": Scale(1_300_000_000, 24, 2048, 32_000),
}

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
  # Heads of 256, V = 2 K; here too the chunk changes no number.
  "retnet": {
    "smoke": Shape(4, 16, (86,), chunk=8),
    "tiny": Shape(4, 32, (176,), chunk=16),
    "340m": Shape(4, 256, (1408,), chunk=64),
    "760m": Shape(6, 256, (2304,), chunk=64),
    "1b3": Shape(8, 256, (2880,), chunk=64),
  },
  # F is of two matrices; the chunk changes no number.
  "rwkv7": {
    "smoke": Shape(4, 16, (214,), chunk=8),
    "tiny": Shape(4, 32, (442,), chunk=16),
    "340m": Shape(16, 64, (3904,), chunk=64),
    "760m": Shape(24, 64, (6272,), chunk=64),
    "1b3": Shape(32, 64, (8192,), chunk=64),
  },
  # Mamba and attention in turn, a feed-forward part after each.
  "samba": {
    "smoke": Shape(4, 16, (128,), chunk=8, window=16),
    "tiny": Shape(4, 32, (280,), chunk=8, window=64),
    "340m": Shape(16, 64, (2368,), chunk=64, window=2048),
    "760m": Shape(12, 128, (3776,), chunk=64, window=2048),
    "1b3": Shape(16, 128, (4864,), chunk=64, window=2048),
  },
  # The chunk is not part of the delta rule: it says what is computed at once.
  "deltanet": {
    "smoke": Shape(4, 16, (170,), chunk=8),
    "tiny": Shape(4, 32, (344,), chunk=16),
    "340m": Shape(8, 128, (2816,), chunk=64),
    "760m": Shape(12, 128, (4352,), chunk=64),
    "1b3": Shape(16, 128, (5632,), chunk=64),
  },
  # HK = 3/4 D and V = 2 K, as the authors of both have it.
  "gated_deltanet": {
    "smoke": Shape(3, 16, (124,), chunk=8, value_dim=32),
    "tiny": Shape(3, 32, (254,), chunk=16, value_dim=64),
    "340m": Shape(6, 128, (2112,), chunk=64, value_dim=256),
    "760m": Shape(9, 128, (3328,), chunk=64, value_dim=256),
    "1b3": Shape(12, 128, (4288,), chunk=64, value_dim=256),
  },
  "comba": {
    "smoke": Shape(3, 16, (124,), chunk=8, value_dim=32),
    "tiny": Shape(3, 32, (254,), chunk=16, value_dim=64),
    "340m": Shape(6, 128, (2112,), chunk=64, value_dim=256),
    "760m": Shape(9, 128, (3328,), chunk=64, value_dim=256),
    "1b3": Shape(12, 128, (4288,), chunk=64, value_dim=256),
  },
  # Heads of 64, M = 4 K and C = 16 are those of its authors.
  "ttt_linear": {
    "smoke": Shape(4, 16, (162,), 0, 8),
    "tiny": Shape(4, 32, (334,), 0, 16),
    "340m": Shape(16, 64, (2752,), 0, 16),
    "760m": Shape(24, 64, (4352,), 0, 16),
    "1b3": Shape(32, 64, (5632,), 0, 16),
  },
  "ttt_mlp": {
    "smoke": Shape(4, 16, (120,), 64, 8),
    "tiny": Shape(4, 32, (256,), 128, 16),
    "340m": Shape(16, 64, (2624,), 256, 16),
    "760m": Shape(24, 64, (4224,), 256, 16),
    "1b3": Shape(32, 64, (5440,), 256, 16),
  },
  # K = 128, M = K, C = 64, at the small sizes M = 2 K, C = 16: of the same
  # parameters and state, K = 64, M = 2 K, C = 16 has three times the bundles
  # (docs/kernels.md).
  "titans_lmm": {
    "smoke": Shape(4, 16, (128,), 32, 8),
    "tiny": Shape(4, 32, (258,), 64, 16),
    "340m": Shape(8, 128, (2368,), 128, 64),
    "760m": Shape(12, 128, (3776,), 128, 64),
    "1b3": Shape(16, 128, (4864,), 128, 64),
  },
  "dla": {
    "smoke": Shape(4, 16, (128,), 32, 8),
    "tiny": Shape(4, 32, (258,), 64, 16),
    "340m": Shape(8, 128, (2368,), 128, 64),
    "760m": Shape(12, 128, (3776,), 128, 64),
    "1b3": Shape(16, 128, (4864,), 128, 64),
  },
  # C = 16 (Miras: 16 or 64): it has no kernel, which a longer chunk would fill.
  "memora": {
    "smoke": Shape(4, 16, (90,), 32, 8),
    "tiny": Shape(4, 32, (218,), 64, 16),
    "340m": Shape(16, 64, (2304,), 128, 16),
    "760m": Shape(24, 64, (3648,), 128, 16),
    "1b3": Shape(32, 64, (4800,), 128, 16),
  },
  # Attention beside the memory; M = 2 K. K = 64, M = 4 K, C = 16 has four
  # times the bundles.
  "titans_mag": {
    "smoke": Shape(4, 16, (36,), 32, 8, window=16),
    "tiny": Shape(4, 32, (82,), 64, 16, window=64),
    "340m": Shape(8, 128, (896,), 256, 64, window=1024),
    "760m": Shape(12, 128, (1600,), 256, 64, window=1024),
    "1b3": Shape(16, 128, (2048,), 256, 64, window=1024),
  },
  "titans_mal": {
    "smoke": Shape(4, 16, (36,), 32, 8, window=16),
    "tiny": Shape(4, 32, (82,), 64, 16, window=64),
    "340m": Shape(8, 128, (896,), 256, 64, window=1024),
    "760m": Shape(12, 128, (1600,), 256, 64, window=1024),
    "1b3": Shape(16, 128, (2048,), 256, 64, window=1024),
  },
  # Here a window is a segment.
  "titans_mac": {
    "smoke": Shape(4, 16, (36,), 32, 8, window=16),
    "tiny": Shape(4, 32, (82,), 64, 16, window=64),
    "340m": Shape(8, 128, (896,), 256, 64, window=1024),
    "760m": Shape(12, 128, (1600,), 256, 64, window=1024),
    "1b3": Shape(16, 128, (2048,), 256, 64, window=1024),
  },
  # K = 128, M = K, C = 64: the parameters and state of K = 64, M = 2K at half
  # the time of a step (docs/mathematics.md 9).
  "hope": {
    "smoke": Shape(4, 16, (32,) * 3, 32, 8),
    "tiny": Shape(4, 32, (64,) * 3, 32, 16),
    "340m": Shape(8, 128, (704,) * 3, 128, 64),
    "760m": Shape(12, 128, (1152,) * 3, 128, 64),
    "1b3": Shape(16, 128, (1536,) * 3, 128, 64),
  },
  # The chunk length of camera-ready Fig. 3.
  "hope_paper": {
    "smoke": Shape(4, 16, (32,) * 3, 32, 8),
    "tiny": Shape(4, 32, (28,) * 3, 64, 16),
    "340m": Shape(16, 64, (704,) * 3, 128, 16),
    "760m": Shape(24, 64, (1152,) * 3, 128, 16),
    "1b3": Shape(32, 64, (1536,) * 3, 128, 16),
  },
  # K = 128, C = 64 here too: the walk has half the bundles of K = 64, C = 16
  # (docs/kernels.md), and a state twice as large. F at 1b3 is that of hope,
  # whole tiles of 128.
  "hope_linear": {
    "smoke": Shape(4, 16, (40,) * 3, 0, 8),
    "tiny": Shape(4, 32, (82,) * 3, 0, 16),
    "340m": Shape(8, 128, (768,) * 3, 0, 64),
    "760m": Shape(12, 128, (1216,) * 3, 0, 64),
    "1b3": Shape(16, 128, (1536,) * 3, 0, 64),
  },
}
