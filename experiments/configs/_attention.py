"""Builders of the configs with softmax attention.

HOPE-Attention is the Transformer++ whose feed-forward part is a continuum
memory system of three levels (paper eq. 97); with one level they are the same.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def transformer(size: str, arg: str) -> ConfigDict:
  """Transformer++ at a scale; preset A's rate (GDN, Titans)."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["transformer"][size]
  cms = _common.cms(("ffn",), shape.widths, (0,))
  rate = None if size in ("smoke", "tiny") else 4e-4
  return _common.language_model(
    size, _model("transformer", shape, cms), learning_rate=rate
  )


def hope_attention(size: str, arg: str) -> ConfigDict:
  """HOPE-Attention at a scale: attention and three levels."""
  size = _common.size_of(size, arg)
  periods = _common.SCALES[size].cms_periods
  shape = presets.SHAPES["hope_attention"][size]
  cms = _common.cms(("high", "mid", "low"), shape.widths, periods)
  return _common.language_model(size, _model("hope_attention", shape, cms))


def _model(arch: str, shape: presets.Shape, cms: ConfigDict) -> ConfigDict:
  memory = ConfigDict(
    dict(
      # Of attention to a whole text: xla, pallas_tpu; auto: by the platform.
      implementation="auto",
    )
  )
  return ConfigDict(
    dict(
      arch=arch,
      heads=shape.heads,
      head_dim=shape.head_dim,
      mixer=memory,
      cms=cms,
    )
  )
