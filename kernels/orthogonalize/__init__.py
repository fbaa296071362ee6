"""Newton-Schulz orthogonalisation of matrices, stacks and sharded trees."""

from nl_jax.kernels.orthogonalize.api import orthogonalize as orthogonalize
from nl_jax.kernels.orthogonalize.api import (
  orthogonalize_tree as orthogonalize_tree,
)
from nl_jax.kernels.orthogonalize.coefficients import NS_COEFFS as NS_COEFFS
from nl_jax.kernels.orthogonalize.sharded import NSSharding as NSSharding
