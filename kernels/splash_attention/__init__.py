"""Softmax attention that never holds the T x T weights, on TPUs."""

from nl_jax.kernels.splash_attention.api import NAME as NAME
from nl_jax.kernels.splash_attention.api import share as share
from nl_jax.kernels.splash_attention.api import (
  splash_attention as splash_attention,
)
from nl_jax.kernels.splash_attention.api import supports as supports
