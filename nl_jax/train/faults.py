"""The report of a step that was not finite: where it began."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import files as whole
from nl_jax import sharding
from nl_jax.train import files
from nl_jax.train import step as step_lib


def write(
  workdir: pathlib.Path,
  step: int,
  model: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  rows: Mapping[str, np.ndarray],
  values: Mapping[str, float],
) -> pathlib.Path:
  """Runs a step's batch again, piece by piece, and writes what went wrong.

  All processes call it; process 0 writes `nan_step_<step>.json`, and every
  process its rows of the batch: `nan_step_<step>.npz`, with `_<process>`
  before the dot on processes other than 0.

  Args:
    workdir: of the run.
    step: the update that was skipped, counted from 1.
    model: see `step.loss_sum`.
    params: those that the step saw.
    batch: the global batch on the devices.
    rows: this process's rows of it.
    values: metrics of the step.

  Returns:
    The path of the report.
  """
  report = {
    "step": step,
    "metrics": {k: repr(float(v)) for k, v in values.items()},
    "first_not_finite": first(model, params, batch),
    "rows": bad_rows(model, params, batch),
  }
  path = workdir / f"nan_step_{step}.json"
  process = jax.process_index()
  suffix = f"_{process}" if process else ""
  rows_path = workdir / f"nan_step_{step}{suffix}.npz"
  with files.writing(rows_path), whole.replacing(rows_path) as file:
    arrays: Any = dict(rows)
    np.savez(file, **arrays)
  if not process:
    files.write_json(path, report)
  return path


def first(
  model: Any, params: Any, batch: Mapping[str, jax.Array]
) -> dict[str, Any] | None:
  """The first leaf with a value that is not finite, in order of computation.

  Returns:
    {"where", "leaf", "index", "count"}: of batch, parameters, memory states,
    inner-loop metrics (gates), logits, loss or gradients; None where all are
    finite.
  """

  def forward(
    params: Any, batch: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    logits, state, metrics = model.apply(
      params, batch["inputs"], segment_ids=batch["segment_ids"]
    )
    losses = step_lib.cross_entropy(logits, batch["targets"])
    total = jnp.sum(losses * batch["weights"])
    return total, (state, metrics, logits, losses)

  (_, (state, metrics, logits, losses)), grads = jax.jit(
    jax.value_and_grad(forward, has_aux=True)
  )(params, batch)
  stages = {
    "batch": batch,
    "parameters": params,
    "memory states": state,
    "inner loop": metrics,
    "logits": logits,
    "loss": losses,
    "gradients": grads,
  }
  for where, tree in stages.items():
    for leaf, index, count in not_finite(tree):
      return {"where": where, "leaf": leaf, "index": index, "count": count}
  return None


def not_finite(tree: Any) -> Iterator[tuple[str, list[int], int]]:
  """(path, index of the first, count) of leaves that are not all finite."""
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      continue
    bad = ~np.isfinite(_local(x))
    if bad.any():
      where = np.unravel_index(int(bad.argmax()), bad.shape)
      name = sharding.path_name(path)
      yield name, [int(i) for i in where], int(bad.sum())


def _local(x: Any) -> np.ndarray:
  """All of an array, or this process's first piece of it."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = x.addressable_data(0)
  return np.asarray(x, dtype=np.float64)


def bad_rows(
  model: Any, params: Any, batch: Mapping[str, jax.Array]
) -> list[int]:
  """Rows of the batch whose loss is not finite."""

  def row_losses(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    logits, _, _ = model.apply(
      params, batch["inputs"], segment_ids=batch["segment_ids"]
    )
    losses = step_lib.cross_entropy(logits, batch["targets"])
    return jnp.sum(losses * batch["weights"], axis=1)

  bad_B = ~np.isfinite(_local(jax.jit(row_losses)(params, batch)))
  return [int(i) for i in np.flatnonzero(bad_B)]
