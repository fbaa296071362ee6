"""Builder of the Samba configs (arXiv 2406.07522).

Mamba and sliding-window attention in turn, each with a plain feed-forward
block; definition and shapes: model.md sections 6 and 7.2.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def samba(size: str, arg: str) -> ConfigDict:
  """Samba at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["samba"][size]
  memory = ConfigDict(
    dict(
      window=shape.window,  # Tokens that attention sees, its own included.
      state_dim=16,  # Numbers that Mamba holds a channel.
      chunk=shape.chunk,  # Tokens Mamba computes at once; changes no number.
      # Of attention to a whole text: xla, pallas_tpu; auto: by the platform.
      implementation="auto",
      walk="auto",  # Or xla, pallas_tpu; the kernels on a TPU where they can.
    )
  )
  return _common.baseline("samba", size, shape, memory)
