"""Coefficient tables of the Newton-Schulz iteration (docs/mathematics.md 10.1).

A step maps x to a x + (b A + c A A) x with A = x x^H, so that a singular value
s becomes a s + b s^3 + c s^5.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Table = Sequence[Sequence[float]]
Steps = int | jax.Array  # A traced count, as `inject_hyperparams` makes one.

# The gradient step of eq. 44 is not a polynomial table; it has its own loop.
EQ44 = "eq44"

NS_COEFFS = {
  # Keller Jordan's Muon: every step alike.
  "jordan": ((3.4445, -4.7750, 2.0315),),
  # arXiv 2505.16932, with its 2 % safety factor already inside.
  "polar_express": (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
  ),
  # x (3 I - x^T x) / 2.
  "cubic": ((1.5, -0.5, 0.0),),
}

# The norm is multiplied by this, so that no singular value exceeds 1.
NORM_FACTORS = {"polar_express": 1.02}


def check(coeffs: str | Table, ns_steps: Steps) -> None:
  """Raises ValueError or TypeError for arguments that mean nothing."""
  if isinstance(ns_steps, jax.Array):
    if ns_steps.ndim or not jnp.issubdtype(ns_steps.dtype, jnp.integer):
      raise TypeError(
        "ns_steps must be an int or one integer of an array, got "
        f"{ns_steps.dtype} of shape {ns_steps.shape}"
      )
  elif not isinstance(ns_steps, int) or isinstance(ns_steps, bool):
    raise TypeError(f"ns_steps must be an int, got {ns_steps!r}")
  elif ns_steps < 0:
    raise ValueError(f"ns_steps must be >= 0, got {ns_steps}")
  if isinstance(coeffs, str):
    names = (*NS_COEFFS, EQ44)
    if coeffs not in names:
      raise ValueError(
        f"coeffs must be one of {names} or a (k, 3) table, got {coeffs!r}"
      )
    return
  shape = np.shape(coeffs)
  if len(shape) != 2 or shape[1] != 3 or not shape[0]:
    raise ValueError(
      "coeffs must be a name or a table of shape (k, 3), got shape "
      f"{shape}; names: {(*NS_COEFFS, EQ44)}"
    )


def is_static(ns_steps: Steps) -> bool:
  """Whether the count is known when the program is made."""
  return not isinstance(ns_steps, jax.Array)


def rows(coeffs: str | Table) -> np.ndarray:
  """The table (k, 3) of a name, or that given."""
  found = NS_COEFFS[coeffs] if isinstance(coeffs, str) else coeffs
  return np.asarray(found, np.float64)


def repeated(rows: np.ndarray, ns_steps: int) -> np.ndarray:
  """(ns_steps, 3): the first rows, or all and then the last one again."""
  rows = rows[:ns_steps]
  return np.pad(rows, ((0, ns_steps - len(rows)), (0, 0)), mode="edge")
