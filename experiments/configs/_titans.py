"""Builders of the Titans configs (arXiv 2501.00663).

Deep memories that learn by momentum; shapes, chunks and gates' starts are
ours, unstated there (docs/mathematics.md 6, 7.2 and 9).
"""

from typing import Any

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def lmm(size: str, arg: str) -> ConfigDict:
  """Titans (LMM) at a scale; preset B's rate, as HOPE."""
  return _deep("titans_lmm", _common.size_of(size, arg))


def dla(size: str, arg: str) -> ConfigDict:
  """Deep linear attention at a scale, Titans without error and momentum."""
  return _deep("dla", _common.size_of(size, arg))


def memora(size: str, arg: str) -> ConfigDict:
  """Memora (Miras) at a scale."""
  size = _common.size_of(size, arg)
  rank = 32 if size in ("smoke", "tiny") else 64
  return _deep("memora", size, rank=rank)


def mag(size: str, arg: str) -> ConfigDict:
  """Titans, memory as gate, at a scale."""
  return _hybrid("titans_mag", "window", size, arg)


def mal(size: str, arg: str) -> ConfigDict:
  """Titans, memory as layer, at a scale."""
  return _hybrid("titans_mal", "window", size, arg)


def mac(size: str, arg: str) -> ConfigDict:
  """Titans, memory as context, at a scale."""
  return _hybrid("titans_mac", "segment", size, arg)


def _hybrid(arch: str, name: str, size: str, arg: str) -> ConfigDict:
  """A memory with attention beside it, to as many tokens as `name` says."""
  size = _common.size_of(size, arg)
  return _deep(arch, size, **{name: presets.SHAPES[arch][size].window})


def _deep(arch: str, size: str, **says: Any) -> ConfigDict:
  shape = presets.SHAPES[arch][size]
  mixer = dict(hidden=shape.hidden, chunk=shape.chunk)
  return _common.baseline(arch, size, mixer | says, learning_rate=None)
