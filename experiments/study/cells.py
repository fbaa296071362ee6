"""What the tables of studies are made of: rows, and means over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any


def by_row(runs: Sequence[Any]) -> dict[str, list[Any]]:
  """Finished runs by the name of their row."""
  groups: dict[str, list[Any]] = {}
  for run in runs:
    groups.setdefault(run.row, []).append(run)
  return groups


def cell(values: Sequence[float], form: str = ".3f") -> str:
  """Mean, and the spread over seeds where there are several."""
  mean = format(statistics.fmean(values), form)
  if len(values) < 2:
    return mean
  return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"
