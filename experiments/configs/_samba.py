"""Builder of the Samba configs (arXiv 2406.07522).

Mamba and sliding-window attention in turn, each with a plain feed-forward
block; definition and shapes: docs/mathematics.md 6 and 7.2.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def samba(size: str, arg: str) -> ConfigDict:
  """Samba at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["samba"][size]
  mixer = dict(window=shape.window, chunk=shape.chunk)
  return _common.baseline("samba", size, mixer)
