"""Checkpoints: state, place in the data, and what a run must know of itself."""

from typing import Any

import jax


def latest_step(workdir: str) -> int | None:
  """The newest checkpoint of a run, None if there is none."""
  raise NotImplementedError


def read_config(workdir: str) -> dict[str, Any]:
  """The resolved config of the run in a workdir.

  Raises:
    ValueError: no run there.
  """
  raise NotImplementedError


def load_params(
  workdir: str,
  model: Any,
  *,
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Any, int]:
  """Loads the parameters of a run, without its optimizer.

  Args:
    workdir: of the run.
    model: its `init` gives the tree.
    step: which checkpoint; None: the newest that can be read.
    mesh: None: on the default device.

  Returns:
    The parameters and the step.

  Raises:
    ValueError: no run or checkpoint there, or of another model.
  """
  raise NotImplementedError
