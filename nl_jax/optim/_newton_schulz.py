"""How the optimizers make matrices orthogonal."""

import dataclasses
from typing import Any

import jax

from nl_jax.kernels import orthogonalize
from nl_jax.kernels.orthogonalize import coefficients
from nl_jax.optim import _dims

Tree = Any


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
  """Newton-Schulz iterations, but for their number.

  That is an argument of each optimizer, `ns_steps`: it may be traced.

  Attributes:
    coeffs: coefficients of Newton-Schulz, a name or a table (`orthogonalize`).
    eps: added to the norms that it divides by.
    dtype: dtype of the Newton-Schulz iterations; None is at least float32.
    sharding: where it runs on a mesh.
  """

  coeffs: str | coefficients.Table = "jordan"
  eps: jax.typing.ArrayLike = 1e-12
  dtype: jax.typing.DTypeLike | None = None
  sharding: orthogonalize.NSSharding | None = None

  def orthogonalize(
    self, tree: Tree, specs: list[_dims.Spec], steps: coefficients.Steps
  ) -> Tree:
    """The tree with each matrix made orthogonal.

    Args:
      tree: updates.
      specs: one a leaf; those of None pass.
      steps: iterations.
    """
    dims = jax.tree.unflatten(jax.tree.structure(tree), specs)
    return orthogonalize.orthogonalize_tree(
      tree, dims, coeffs=self.coeffs, ns_steps=steps, eps=self.eps,
      ns_dtype=self.dtype, sharding=self.sharding,
    )  # fmt: skip
