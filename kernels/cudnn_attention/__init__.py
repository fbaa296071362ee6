"""Softmax attention that never holds the T x T logits, on NVIDIA GPUs."""

from nl_jax.kernels.cudnn_attention.api import (
  cudnn_attention as cudnn_attention,
)
from nl_jax.kernels.cudnn_attention.api import supports as supports
