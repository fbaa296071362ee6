"""Builders of the delta-rule baselines: DeltaNet, Gated DeltaNet and Comba.

Matrix memories that learn by the delta rule, with a plain feed-forward block;
definitions and shapes: model.md sections 6 and 7.2.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def deltanet(size: str, arg: str) -> ConfigDict:
  """DeltaNet at a scale."""
  return _delta("deltanet", size, arg, output_gate=False)


def gated_deltanet(size: str, arg: str) -> ConfigDict:
  """Gated DeltaNet at a scale."""
  return _delta("gated_deltanet", size, arg, output_gate=True)


def comba(size: str, arg: str) -> ConfigDict:
  """Comba at a scale."""
  config = _delta("comba", size, arg, output_gate=True)
  # Start of D_h in the reads q - D_h p; its authors: 1, or 0.02 when small.
  config.model.mixer.correction = 1.0
  return config


def _delta(arch: str, size: str, arg: str, output_gate: bool) -> ConfigDict:
  size = _common.size_of(size, arg)
  shape = presets.SHAPES[arch][size]
  memory = ConfigDict(
    dict(
      value_dim=shape.value_dim,  # V of a head; 0: head_dim (GDN: twice).
      output_gate=output_gate,  # SiLU(x W_g) before the output kernel.
      allow_neg_eigval=False,  # beta up to 2: a write may turn a sign.
      chunk=shape.chunk,  # Tokens computed at once; changes no number.
      remat_group=4,  # Chunks between states kept for the backward pass.
      walk="auto",  # Or xla, pallas_tpu; the kernels on a TPU where they can.
    )
  )
  return _common.baseline(arch, size, shape, memory)
