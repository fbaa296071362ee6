"""Builder of RWKV-7; definitions and shapes: model.md sections 6 and 7.2."""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict

# Inner widths of the LoRAs of w, a, v and g (model.md 7.2; small ones ours).
_RANKS = {"smoke": (8, 8, 4, 16), "tiny": (16, 16, 8, 32)}


def rwkv7(size: str, arg: str) -> ConfigDict:
  """RWKV-7 at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["rwkv7"][size]
  ranks = _RANKS.get(size, (64, 64, 32, 128))
  memory = ConfigDict(
    dict(
      decay_rank=ranks[0],  # Of the decays w.
      rate_rank=ranks[1],  # Of the rates a.
      value_rank=ranks[2],  # Of the share of the first layer's values.
      gate_rank=ranks[3],  # Of the output gate g.
      chunk=shape.chunk,  # Tokens computed at once; changes no number.
      remat_group=4,  # Chunks between states kept for the backward pass.
      walk="auto",  # Or xla, pallas_tpu; the kernels on a TPU where they can.
    )
  )
  return _common.baseline("rwkv7", size, shape, memory)
