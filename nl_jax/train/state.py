"""The training state: a plain dict {"params", "opt", "step", "skipped"}."""

from typing import Any

import jax
import optax

State = dict[str, Any]


def create(
  model: Any,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  mesh: jax.sharding.Mesh,
) -> tuple[State, State]:
  """Makes the state before the first step, sharded where it is made.

  Returns:
    The state (step and skipped are int32 scalars), and its shardings.
  """
  raise NotImplementedError
