"""One task from its file to its numbers, with and without seqio.

    prepare (file, requests, rows)  ->  score  ->  record (what a result keeps)

`run` does it for several tasks: one that fails is recorded, the others go on.
"""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from absl import logging

from nl_jax.eval import encoding, files, metrics, requests, scoring

# What a task may raise without ending the others: files, values, devices.
FAILURES = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError)
Score = Callable[[Sequence[scoring.Pair]], scoring.Scores]


class Prepared(NamedTuple):
  """A task that is ready to be scored.

  Attributes:
    name: of the task; wikitext_<window> at a further window.
    task: its definition.
    loaded: its file; the documents are let go.
    requests: their number.
    documents: their number.
    rows: of tokens.
    protocol: that the rows were made by.
    limit: documents asked for; 0: all.
  """

  name: str
  task: requests.Task
  loaded: files.Loaded
  requests: int
  documents: int
  rows: encoding.Rows
  protocol: encoding.Protocol
  limit: int


@dataclasses.dataclass
class Result:
  """What came of a task.

  Attributes:
    record: what a result file keeps of it; `error` where it failed.
    samples: a line a document; none where it failed.
  """

  record: dict[str, Any]
  samples: list[dict[str, Any]]


def check_names(names: Iterable[str]) -> None:
  """Raises ValueError for a name that is not a task's."""
  for name in names:
    if name not in requests.TASKS:
      raise ValueError(f"no task {name!r}; known: {', '.join(requests.TASKS)}")


def has_seqio() -> bool:
  """Whether seqio and TensorFlow are installed."""
  return all(importlib.util.find_spec(name) for name in ("seqio", "tensorflow"))


def prepare(
  name: str,
  folder: pathlib.Path,
  tokenizer: Any,
  protocol: encoding.Protocol,
  limit: int = 0,
) -> Prepared:
  """Reads a task's file and makes its rows.

  Args:
    name: of the task, or wikitext_<window>.
    folder: with the data.
    tokenizer: of `nl_jax.data.tokenizers`.
    protocol: its window is replaced by the name's, if that has one.
    limit: documents; 0: all.

  Raises:
    FileNotFoundError, ValueError: naming file and line.
  """
  base, _, window = name.partition("wikitext_")
  if window:
    base, protocol = "wikitext", dataclasses.replace(
      protocol, window=int(window)
    )  # fmt: skip
  task = requests.TASKS[base]
  loaded = files.load(task, folder, limit)
  asked = requests.of(task, loaded.docs, loaded.path)
  rows = encoding.encode(asked, tokenizer, protocol, loaded.path)
  return Prepared(
    name,
    task,
    loaded._replace(docs=[]),
    len(asked),
    len(loaded.docs),
    rows,
    protocol,
    limit,
  )


def run(
  prepared: Iterable[Prepared],
  score: Score,
  *,
  through: Callable[[Prepared, Score], tuple[dict, scoring.Scores]],
) -> Iterable[tuple[str, Result]]:
  """Scores tasks one by one; a failure is the result of its task.

  Args:
    prepared: the tasks.
    score: pairs (inputs, targets) -> Scores.
    through: `direct`, or a function that goes through seqio.
  """
  for one in prepared:
    begin = time.monotonic()
    try:
      values, scores = through(one, score)
      targets = [row.about for row in one.rows.rows]
      # In the form that metrics take.
      taken = (scores.lls, {"is_greedy": scores.is_greedy})
      samples = metrics.samples(targets, taken)
      error = ""
    except FAILURES as e:
      values, samples, error = {}, [], sentence(e)
      logging.warning("%s failed: %s", one.name, error)
    seconds = time.monotonic() - begin
    yield one.name, Result(record(one, values, seconds, error), samples)


def direct(
  prepared: Prepared, score: Score
) -> tuple[dict[str, float], scoring.Scores]:
  """Metrics and scores of a task, without seqio."""
  rows = prepared.rows.rows
  scores = score([(row.inputs, row.targets) for row in rows])
  about = [row.about for row in rows]
  taken = (scores.lls, {"is_greedy": scores.is_greedy})
  return metrics.of(prepared.name)(about, taken), scores


def record(
  prepared: Prepared,
  values: dict[str, float],
  seconds: float,
  error: str = "",
) -> dict[str, Any]:
  """What a result file keeps of a task.

  Args:
    prepared: the task.
    values: metrics, each with its standard error.
    seconds: of scoring.
    error: why it failed; "".
  """
  loaded, rows = prepared.loaded, prepared.rows
  kept = {
    "source": prepared.task.source,
    "split": prepared.task.split,
    "file": str(loaded.path),
    "sha256": loaded.sha256,
    "bytes": loaded.bytes,
    "fidelity": loaded.fidelity,
    "n_docs": prepared.documents,
    "n_docs_expected": prepared.task.docs,
    "limit": prepared.limit,
    "n_requests": prepared.requests,
    "n_rows": len(rows.rows),
    "n_truncated": rows.truncated,
    "n_scored_tokens": sum(len(row.targets) for row in rows.rows),
    "seconds": round(seconds, 3),
    "warnings": loaded.warnings,
    "metrics": {
      key: {
        "value": value,
        "stderr": values[key + metrics.SUFFIX],
        "stderr_method": metrics.STDERR[key],
      }
      for key, value in values.items()
      if not key.endswith(metrics.SUFFIX)
    },
  }
  return kept | ({"error": error} if error else {})


def failed(name: str, error: BaseException) -> Result:
  """The result of a task that could not be prepared."""
  said = sentence(error)
  logging.warning("%s failed: %s", name, said)
  return Result({"error": said, "metrics": {}, "warnings": []}, [])


def sentence(error: BaseException) -> str:
  """An error's first line."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
