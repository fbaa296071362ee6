"""Argument checks shared by the optimizers."""

from typing import Any

import jax
import jax.numpy as jnp


def one_of(name: str, value: Any, allowed: tuple) -> None:
  """Raises ValueError, listing the allowed values of a switch."""
  if value not in allowed:
    raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def inexact(params: Any, what: str, allow_complex: bool = True) -> None:
  """Raises TypeError for an integer, bool or complex leaf, with its path."""
  allowed = jnp.inexact if allow_complex else jnp.floating
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, allowed):
      raise TypeError(
        f"{what} needs {allowed.__name__} parameters, got {leaf.dtype} of "
        f"shape {leaf.shape} at {jax.tree_util.keystr(path)}; leave it out "
        "with optax.masked"
      )


def given(params: Any, name: str) -> None:
  """Raises ValueError unless an update has the parameters that it needs."""
  if params is None:
    raise ValueError(
      f"{name} needs the parameters: update(updates, state, params)"
    )
