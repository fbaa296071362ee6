"""Builders of the TTT configs (arXiv 2407.04620).

Memories trained by mini-batches of the context, a line or an MLP; shapes:
docs/mathematics.md 7.2, the rest as its authors have it.
"""

from typing import Any

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def linear(size: str, arg: str) -> ConfigDict:
  """TTT-Linear at a scale."""
  return _ttt("ttt_linear", size, arg)


def mlp(size: str, arg: str) -> ConfigDict:
  """TTT-MLP at a scale."""
  return _ttt("ttt_mlp", size, arg, base_lr=0.1)


def _ttt(arch: str, size: str, arg: str, **says: Any) -> ConfigDict:
  size = _common.size_of(size, arg)
  shape = presets.SHAPES[arch][size]
  mixer = dict(hidden=shape.hidden, chunk=shape.chunk)
  return _common.baseline(arch, size, mixer | says)
