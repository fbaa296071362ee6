"""Argument checks shared by the optimizers."""

from typing import Any

import jax
import jax.numpy as jnp


def one_of(name: str, value: Any, allowed: tuple) -> None:
  """Raises ValueError, listing the allowed values of a switch."""
  if value not in allowed:
    raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def inexact(params: Any, what: str) -> None:
  """Raises TypeError for an integer or bool leaf, naming its path."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise TypeError(
        f"{what} needs floating point parameters, got {leaf.dtype} of shape "
        f"{leaf.shape} at {jax.tree_util.keystr(path)}; leave it out with "
        "optax.masked"
      )
