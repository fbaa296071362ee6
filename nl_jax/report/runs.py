"""What a run left behind, read for its report."""

import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from nl_jax.train import files, kept, metrics, origin


class Run(NamedTuple):
  """One run.

  Attributes:
    name: of its folder.
    workdir: the folder.
    lines: of metrics.jsonl, oldest first.
    config: resolved, nested dicts.
    environment: versions of libraries and of the code.
    results: of results.json; {} of a run that is not done.
    sample: text that it wrote; "" where there is none.
    torn: lines of metrics.jsonl that could not be read.
    changes: of the config while it ran: (step, "key: old -> new"), oldest
      first.
    chain: what it came from, oldest first, in words.
    tokenizer: what tells it from others: its name and its hash.
  """

  name: str
  workdir: pathlib.Path
  lines: list[dict[str, Any]]
  config: dict[str, Any]
  environment: dict[str, Any]
  results: dict[str, Any]
  sample: str
  torn: int
  changes: tuple[tuple[int, str], ...] = ()
  chain: tuple[str, ...] = ()
  tokenizer: tuple[str, str] = ("", "")

  def series(self, key: str, x: str = "tokens") -> tuple[list, list]:
    """(x, values) of a metric; what was not finite is nan, and so a gap.

    Args:
      key: of the metric.
      x: "tokens", "step" or "seconds" of training.
    """
    seconds = self.seconds() if x == "seconds" else []
    xs, ys = [], []
    for i, line in enumerate(self.lines):
      if key in line:
        xs.append(seconds[i] if x == "seconds" else line[x])
        ys.append(math.nan if line[key] is None else line[key])
    return xs, ys

  def seconds(self) -> list[float]:
    """Training time at each line: without pauses, stops and evaluation."""
    total, tokens, times = 0.0, 0, []
    for line in self.lines:
      speed = line.get("perf/tokens_per_s")
      if speed:
        total += (line["tokens"] - tokens) / speed
        tokens = line["tokens"]
      times.append(total)
    return times

  def changed_at(self, x: str) -> list[float]:
    """Where on an axis, "tokens" or "seconds", the config changed."""
    seconds, places = self.seconds(), []
    for step in sorted({step for step, _ in self.changes}):
      before = [i for i, line in enumerate(self.lines) if line["step"] <= step]
      if before:
        i = before[-1]
        places.append(seconds[i] if x == "seconds" else self.lines[i][x])
    return places

  def last(self, key: str) -> float | None:
    """The last value of a metric; None where it was never finite."""
    values = [y for y in self.series(key)[1] if not math.isnan(y)]
    return values[-1] if values else None

  def keys(self, prefix: str) -> list[str]:
    """Names of metrics, sorted."""
    return sorted(
      {key for line in self.lines for key in line if key.startswith(prefix)}
    )

  def not_finite(self) -> int:
    """Logged steps whose loss was not finite."""
    return int(np.isnan(self.series("train/loss")[1]).sum())

  def levels(self) -> list[str]:
    """Names of the memories that were measured."""
    return sorted({key.split("/")[1] for key in self.keys("memory/")})


def read(workdir: str) -> Run:
  """Reads a run; one that is under way, too.

  Raises:
    ValueError: no such folder, no run there, or nothing measured yet.
  """
  folder = pathlib.Path(workdir)
  if not folder.is_dir():
    raise ValueError(f"no folder {workdir}: give the --workdir of a run")
  if not (folder / files.CONFIG).is_file():
    raise ValueError(
      f"no run in {workdir}: {files.CONFIG} is missing; give the --workdir of "
      "a run of `python -m experiments.lm`"
    )
  about = files.read_about(folder)
  lines, torn = _lines(folder / metrics.FILE)
  if not lines:
    raise ValueError(
      f"{folder / metrics.FILE} has no line yet: the run has measured nothing"
    )
  results, sample = folder / files.RESULTS, folder / "sample.txt"
  return Run(
    name=folder.resolve().name,
    workdir=folder,
    lines=lines,
    config=about["config"],
    environment={k: about[k] for k in ("versions", "git") if k in about},
    results=files.read_json(results) if results.is_file() else {},
    sample=sample.read_text(encoding="utf-8") if sample.is_file() else "",
    torn=torn,
    changes=tuple(
      (entry["step"], change)
      for entry in about.get(files.CHANGES, ())
      for change in entry["changes"]
    ),
    chain=tuple(map(origin.describe, about.get(files.CHAIN, ()))),
    tokenizer=_tokenizer(about),
  )


def _tokenizer(about: dict[str, Any]) -> tuple[str, str]:
  """Name and hash; the path for a run of an earlier version, without them."""
  name = about["config"].get("data", {}).get("tokenizer", "")
  own = about.get(kept.KEY)
  if not own:
    return pathlib.Path(name).name, name
  return own["file"], own["sha256"][own["file"]]


def by_tokenizer(runs: list[Run]) -> dict[str, list[int]]:
  """Numbers of the runs with each tokenizer, by a name that tells it."""
  found: dict[tuple[str, str], list[int]] = {}
  for number, run in enumerate(runs):
    found.setdefault(run.tokenizer, []).append(number)
  names = [name for name, _ in found]
  return {
    (name[:24] or "no tokenizer")
    + (f" {mark[:8]}" if names.count(name) > 1 else ""): numbers
    for (name, mark), numbers in found.items()
  }


def _lines(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """The readable lines, and how many were not."""
  if not path.is_file():
    return [], 0
  found = metrics.lines(path)
  whole = [
    {k: x for k, x in line.items() if x is None or metrics.is_number(x)}
    for line in found
    if line
  ]
  return whole, len(found) - len(whole)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested config as {"a.b": value}."""
  values: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, dict):
      values |= flat(value, f"{prefix}{key}.")
    else:
      values[prefix + key] = value
  return values


def named_apart(runs: list[Run]) -> list[Run]:
  """Names of runs; folders with the same name get their paths."""
  names = [run.name for run in runs]
  return [
    run._replace(name=str(run.workdir)) if names.count(run.name) > 1 else run
    for run in runs
  ]
