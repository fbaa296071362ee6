"""The mixers by name: what `model.arch` of a config may be."""

from nl_jax.models import mixer as contract
from nl_jax.models.mixers import (
  deltanet,
  gated_deltanet2,
  hope,
  retnet,
  rwkv7,
  samba,
  ttt,
)
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.titans import dla, lmm, mac, mag, mal, memora

MIXERS: dict[str, contract.Mixer] = {
  "comba": deltanet,
  "deltanet": deltanet,
  "dla": dla,
  "gated_deltanet": deltanet,
  "gated_deltanet2": gated_deltanet2,
  "hope": hope,
  "hope_attention": attention,
  "memora": memora,
  "retnet": retnet,
  "rwkv7": rwkv7,
  "samba": samba,
  "titans_lmm": lmm,
  "titans_mac": mac,
  "titans_mag": mag,
  "titans_mal": mal,
  "transformer": attention,
  "ttt_linear": ttt,
  "ttt_mlp": ttt,
}
