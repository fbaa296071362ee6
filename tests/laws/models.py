"""The models that the laws are tested on: every arch, at its smoke size."""

import dataclasses

from nl_jax.memory import self_modifying
from nl_jax.models import cms, layers, lm
from nl_jax.models.incontext import model as incontext
from nl_jax.models.mixers import (
  deltanet,
  gated_deltanet2,
  retnet,
  rwkv7,
  samba,
  ttt,
)
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.titans import (
  dla,
  memora,
)
from nl_jax.models.mixers.titans import (
  lmm as titans,
)
from nl_jax.models.mixers.titans import (
  mac as titans_mac,
)
from nl_jax.models.mixers.titans import (
  mag as titans_mag,
)
from nl_jax.models.mixers.titans import (
  mal as titans_mal,
)

_LEVELS = cms.Options(("high", "mid", "low"), (48, 48, 48), (1, 4, 16))
_DELTA = dict(
  memory="linear", objective="dot", dgd_coef="raw", residual=False,
  residual_clip=0.0,
)  # fmt: skip


_PLAIN = cms.Options(("ffn",), (128,), (0,))


def _model(name, levels=_LEVELS, **memory):
  config = None
  if name == "hope":
    chunks = dict(chunk_memory=8, chunk_gen=8)
    config = self_modifying.Options(**chunks | memory)
  return _shaped(name, config, levels)


def _shaped(name, options, levels=_PLAIN, head_dim=16, **more):
  return lm.LanguageModel(
    name, width=64, layers=2, heads=4, head_dim=head_dim, vocab_size=320,
    sequence_length=64, cms=levels, mixer=options, **more,
  )  # fmt: skip


MODELS = {
  "transformer": lambda: _model(
    "transformer", cms.Options(("ffn",), (176,), (0,))
  ),
  "hope_attention": lambda: _model("hope_attention"),
  "hope_attention_independent": lambda: _model(
    "hope_attention", dataclasses.replace(_LEVELS, variant="independent")
  ),
  # All that pretrained models have beyond Transformer++.
  "hope_attention_pretrained": lambda: _shaped(
    "hope_attention",
    attention.Options(
      kv_heads=2, bias=True, qk_norm=True, rope_theta=500.0,
      rope_scaling=layers.RopeScaling("llama3", 4.0, 1.0, 4.0, 16),
    ),
    _LEVELS, head_dim=20, tied=False, norm_epsilon=1e-5,
  ),
  # Two layers of 13 tokens before each: the first is seen by all 26.
  "hope_attention_window": lambda: _shaped(
    "hope_attention", attention.Options(window=14), _LEVELS
  ),
  "hope": lambda: _model("hope", hidden=32),
  "hope_linear": lambda: _model("hope", **_DELTA),
  "hope_momentum": lambda: _model(
    "hope", momentum="ema", read="before", chunk_gen=4
  ),
  "hope_literal": lambda: _model(
    "hope", read="chunk_start", value_source="self", value_norm="target",
    gen_input="slice", dgd_scope="input_layer", dgd_coef="raw", eta_max=0.1,
    adaptive_q=True,
  ),
  "hope_static": lambda: _model(
    "hope", gate_source="static", adaptive=("k", "v"), memory="glu"
  ),
  "deltanet": lambda: _shaped(
    "deltanet", deltanet.Options(chunk=8, allow_neg_eigval=True)
  ),
  "gated_deltanet": lambda: _shaped(
    "gated_deltanet",
    deltanet.Options(chunk=8, value_dim=32, output_gate=True),
  ),
  "gated_deltanet2": lambda: _shaped(
    "gated_deltanet2",
    gated_deltanet2.Options(value_dim=32, decay_rank=8, gate_rank=8, chunk=8),
  ),
  "retnet": lambda: _shaped("retnet", retnet.Options(chunk=8)),
  "rwkv7": lambda: _shaped(
    "rwkv7",
    rwkv7.Options(
      decay_rank=8, rate_rank=8, value_rank=4, gate_rank=16, chunk=8
    ),
  ),
  "samba": lambda: _shaped("samba", samba.Options(window=16, chunk=8)),
  "comba": lambda: _shaped(
    "comba",
    deltanet.Options(chunk=8, value_dim=32, output_gate=True, correction=1.0),
  ),
  "titans_lmm": lambda: _shaped(
    "titans_lmm", titans.Options(chunk=8, hidden=32)
  ),
  # Local memories of two chunks beside a global one.
  "titans_span": lambda: _shaped(
    "titans_lmm", titans.Options(chunk=4, hidden=16, span=8)
  ),
  # A window longer than a chunk.
  "titans_omega": lambda: _shaped(
    "titans_lmm", titans.Options(chunk=8, hidden=32, omega=11)
  ),
  "titans_muon": lambda: _shaped(
    "titans_lmm", titans.Options(chunk=8, hidden=32, inner_muon="chunk")
  ),
  "memora": lambda: _shaped(
    "memora", memora.Options(chunk=8, hidden=32, rank=8, eta_max=0.1)
  ),
  "memora_lag": lambda: _shaped(
    "memora", memora.Options(chunk=8, hidden=32, rank=8, lag=True, eta_max=0.1)
  ),
  "dla": lambda: _shaped("dla", dla.Options(chunk=8, hidden=32)),
  "titans_mac": lambda: _shaped(
    "titans_mac", titans_mac.Options(chunk=8, hidden=32, segment=16)
  ),
  "titans_mag": lambda: _shaped(
    "titans_mag", titans_mag.Options(chunk=8, hidden=32, window=12)
  ),
  "titans_mal": lambda: _shaped(
    "titans_mal", titans_mal.Options(chunk=8, hidden=32, window=12)
  ),
  "ttt_linear": lambda: _shaped("ttt_linear", ttt.Options(chunk=8)),
  "ttt_mlp": lambda: _shaped(
    "ttt_mlp", ttt.Options(chunk=8, base_lr=0.1, pre_conv=False)
  ),
  # Micro-chunks of half a memory's chunk, and of a quarter of the reach.
  "hope_incontext": lambda: incontext.InContextModel(
    _model("hope", **_DELTA),
    incontext.Options(chunks=(4, 8), rates=(0.3, 0.3), reset="document"),
  ),
  "hope_attention_incontext": lambda: incontext.InContextModel(
    _shaped(
      "hope_attention", attention.Options(window=14),
      dataclasses.replace(_LEVELS, variant="nested"),
    ),
    incontext.Options(
      chunks=(5, 10), rates=(0.3, 0.3), fast_layers=2, targets="next",
      rule="momentum", nested_meta="reptile",
    ),
  ),
  "hope_attention_local": lambda: incontext.InContextModel(
    _shaped("hope_attention", attention.Options(window=14), _LEVELS),
    incontext.Options(
      chunks=(4, 8), rates=(0.3, 0.3), rule="dgd", reset="document",
      inner_loss="local_l2",
    ),
  ),
}  # fmt: skip
