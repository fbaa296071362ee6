"""Whether a run with a fault ended bit-identical to an undisturbed one."""

import hashlib
import json
import pathlib
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from nl_jax import sharding
from nl_jax.train import checkpoint, files, metrics

_CLOCK = ("wall_time", "train_seconds")
_ONE = threading.Lock()  # Orbax is not made for many threads.
_SHOWN = 3  # Differences that are shown.


class Record(NamedTuple):
  """All that a finished run left, but for what depends on the clock.

  Attributes:
    lines: of metrics.jsonl.
    results: of results.json.
    step: of the newest checkpoint.
    leaves: of its state, {path: dtype, shape and SHA-256 of the bytes}.
    data: its place in the data.
    consumed: rows that its `meta` says were drawn.
  """

  lines: list[dict[str, Any]]
  results: dict[str, Any]
  step: int
  leaves: dict[str, str]
  data: Any
  consumed: int


def read(workdir: pathlib.Path) -> Record:
  """Reads what a run left.

  Raises:
    ValueError: there is no whole run.
  """
  step = checkpoint.latest_step(str(workdir))
  if step is None or not (workdir / files.RESULTS).exists():
    raise ValueError(f"{workdir} has no finished run")
  place = workdir / files.CHECKPOINTS / str(step)
  text = (workdir / metrics.FILE).read_text(encoding="utf-8")
  results = _timeless(files.read_json(workdir / files.RESULTS))
  results["metrics"] = _timeless(results["metrics"])
  return Record(
    lines=[_timeless(json.loads(line)) for line in text.splitlines()],
    results=results,
    step=step,
    leaves=_leaves(place / "state"),
    data=files.read_json(place / "data" / "metadata"),
    consumed=files.read_json(place / "meta" / "metadata")["rows_consumed"],
  )


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
  return {
    k: v
    for k, v in values.items()
    if k not in _CLOCK and not k.startswith("perf/")
  }


def _leaves(place: pathlib.Path) -> dict[str, str]:
  with _ONE, ocp.PyTreeCheckpointer() as checkpointer:
    state = checkpointer.restore(place.resolve())
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    x = np.asarray(leaf)
    digest = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
    found[sharding.path_name(path)] = f"{x.dtype}{list(x.shape)} {digest}"
  return found


def differences(whole: Record, hurt: Record) -> list[str]:
  """What is not the same in two records; [] where all is."""
  found = []
  if len(whole.lines) != len(hurt.lines):
    found.append(
      f"{len(hurt.lines)} lines of metrics, expected {len(whole.lines)}"
    )
  for a, b in zip(whole.lines, hurt.lines):
    if a != b:
      names = [k for k in {**a, **b} if a.get(k) != b.get(k)]
      found.append(f"the metrics of step {a['step']}: {', '.join(names)}")
  for name in sorted({*whole.leaves, *hurt.leaves}):
    if whole.leaves.get(name) != hurt.leaves.get(name):
      found.append(f"the state's {name}")
  for field in ("results", "step", "data", "consumed"):
    if getattr(whole, field) != getattr(hurt, field):
      found.append(field)
  return found


def told(found: list[str]) -> str:
  """Differences in a line."""
  more = len(found) - _SHOWN
  return "; ".join(found[:_SHOWN]) + (f"; {more} more" if more > 0 else "")


def sentence(said: str) -> str:
  """The one sentence that a command ended with; "" where it is not one."""
  lines = said.strip().splitlines()
  errors = [line for line in lines if line.startswith("error: ")]
  if "Traceback" in said or len(errors) != 1 or lines[-1] != errors[0]:
    return ""
  return errors[0]
