"""Builder of the RetNet configs (arXiv 2307.08621).

Matrix memories that forget at a fixed rate, with a plain feed-forward block;
definition and shapes: docs/mathematics.md 6 and 7.2.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def retnet(size: str, arg: str) -> ConfigDict:
  """RetNet at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["retnet"][size]
  return _common.baseline("retnet", size, dict(chunk=shape.chunk))
