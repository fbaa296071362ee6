"""Builder of RWKV-7; definitions and shapes: docs/mathematics.md 6 and 7.2."""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict

# Inner widths of the LoRAs of w, a, v and g where they are not the authors'.
_RANKS = {"smoke": (8, 8, 4, 16), "tiny": (16, 16, 8, 32)}
_NAMES = ("decay_rank", "rate_rank", "value_rank", "gate_rank")


def rwkv7(size: str, arg: str) -> ConfigDict:
  """RWKV-7 at a scale."""
  size = _common.size_of(size, arg)
  shape = presets.SHAPES["rwkv7"][size]
  ranks = dict(zip(_NAMES, _RANKS.get(size, ())))
  return _common.baseline("rwkv7", size, dict(chunk=shape.chunk) | ranks)
