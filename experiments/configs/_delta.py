"""Builders of the delta-rule baselines: DeltaNet, Gated DeltaNet and Comba.

Matrix memories that learn by the delta rule, with a plain feed-forward block;
definitions and shapes: docs/mathematics.md 6 and 7.2.
"""

from typing import Any

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def deltanet(size: str, arg: str) -> ConfigDict:
  """DeltaNet at a scale."""
  return _delta("deltanet", size, arg)


def gated_deltanet(size: str, arg: str) -> ConfigDict:
  """Gated DeltaNet at a scale."""
  return _delta("gated_deltanet", size, arg, output_gate=True)


def comba(size: str, arg: str) -> ConfigDict:
  """Comba at a scale."""
  return _delta("comba", size, arg, output_gate=True, correction=1.0)


def _delta(arch: str, size: str, arg: str, **says: Any) -> ConfigDict:
  size = _common.size_of(size, arg)
  shape = presets.SHAPES[arch][size]
  mixer = dict(value_dim=shape.value_dim, chunk=shape.chunk)
  return _common.baseline(arch, size, mixer | says)
