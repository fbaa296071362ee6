"""Builders of the configs with softmax attention.

HOPE-Attention is the Transformer++ whose feed-forward part is a continuum
memory system of three levels (paper eq. 97); with one level they are the same.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def transformer(size: str, arg: str) -> ConfigDict:
  """Transformer++ at a scale; preset A's rate (GDN, Titans)."""
  return _common.baseline("transformer", _common.size_of(size, arg), {})


def hope_attention(size: str, arg: str, **says: dict) -> ConfigDict:
  """HOPE-Attention at a scale: attention and three levels.

  Args:
    size: a key of `_common.SCALES`.
    arg: of the config.
    says: what differs in the groups `mixer` and `cms`.
  """
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["hope_attention"][size]
  model = dict(
    arch="hope_attention",
    heads=shape.heads,
    head_dim=shape.head_dim,
    mixer=says.get("mixer", {}),
    cms=_common.three_levels(size, shape) | says.get("cms", {}),
  )
  return _common.language_model(size, model)
