"""Delta gradient descent: a dense layer and a proximal step for kernels."""

from nl_jax.kernels.delta_dense.dense import delta_dense as delta_dense
from nl_jax.kernels.delta_dense.dense import (
  delta_dot_general as delta_dot_general,
)
from nl_jax.kernels.delta_dense.prox import delta_prox as delta_prox
