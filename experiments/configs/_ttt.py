"""Builders of the TTT configs (arXiv 2407.04620).

Memories trained by mini-batches of the context, a line or an MLP; shapes:
model.md section 7.2, the rest as its authors have it.
"""

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def linear(size: str, arg: str) -> ConfigDict:
  """TTT-Linear at a scale."""
  return _ttt("ttt_linear", size, arg, base_lr=1.0)


def mlp(size: str, arg: str) -> ConfigDict:
  """TTT-MLP at a scale."""
  return _ttt("ttt_mlp", size, arg, base_lr=0.1)


def _ttt(arch: str, size: str, arg: str, base_lr: float) -> ConfigDict:
  size = _common.size_of(size, arg)
  shape = presets.SHAPES[arch][size]
  memory = ConfigDict(
    dict(
      hidden=shape.hidden,  # M of the MLP; 0: 4 head_dim. None in ttt_linear.
      chunk=shape.chunk,  # Tokens of a mini-batch.
      base_lr=base_lr,  # Inner rate before its gates; not warmed up.
      pre_conv=True,  # x + conv4(RMSNorm(x)) before the mixer.
      remat_group=4,  # Chunks between states kept for the backward pass.
      walk="auto",  # Or xla, pallas_tpu; the kernels on a TPU where they can.
      stop_grad_writes=False,  # Outer gradient stops at inner writes.
    )
  )
  return _common.baseline(arch, size, shape, memory)
