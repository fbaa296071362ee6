"""Builder of the RetNet configs (arXiv 2307.08621).

Matrix memories that forget at a fixed rate, with a plain feed-forward block;
definition and shapes: model.md sections 6 and 7.2.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def retnet(size: str, arg: str) -> ConfigDict:
  """RetNet at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["retnet"][size]
  memory = ConfigDict(
    dict(
      chunk=shape.chunk,  # Tokens computed at once; changes no number.
      remat_group=4,  # Chunks between states kept for the backward pass.
      walk="auto",  # Or xla, pallas_tpu; the kernels on a TPU where they can.
    )
  )
  return _common.baseline("retnet", size, shape, memory)
