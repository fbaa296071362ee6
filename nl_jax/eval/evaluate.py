"""One task from its file to its numbers, with and without seqio.

    prepare (file, requests, rows)  ->  score  ->  record (what a result keeps)

A task that fails is recorded, and the others continue.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from nl_jax.eval import encoding, files, metrics, requests, scoring

# What a task may raise without ending the others: files, values, devices.
FAILURES = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError)
_WINDOWED = "wikitext_"  # WikiText at a window of its own.
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


def parse(entries: Iterable[str]) -> dict[str, int]:
  """{task: documents, 0 for all} of entries as piqa or piqa:100.

  Raises:
    ValueError: another form, or a name that is not a task's.
  """
  found = {}
  for entry in entries:
    name, colon, limit = entry.partition(":")
    check_names([name])
    if colon and not (limit.isdigit() and int(limit)):
      raise ValueError(
        f"{entry!r} must be a task or task:documents, as piqa:100"
      )
    found[name] = int(limit or 0)
  return found


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
  if name.startswith(_WINDOWED):
    window = int(name.removeprefix(_WINDOWED))
    protocol = dataclasses.replace(protocol, window=window)
    task = requests.TASKS["wikitext"]
  else:
    task = requests.TASKS[name]
  loaded = files.load(task, folder, limit)
  asked = requests.of(task, loaded.docs, loaded.path)
  rows = encoding.encode(asked, tokenizer, protocol, loaded.path)
  if not rows.rows:
    raise ValueError(f"{loaded.path} has no text to score")
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
  prepared: Prepared,
  score: Score,
  through: Callable[[Prepared, Score], tuple[dict, scoring.Scores]],
) -> Result:
  """Scores a task; a failure is its result.

  Args:
    prepared: the task.
    score: pairs (inputs, targets) -> Scores.
    through: `direct`, or what `through_seqio` returned.
  """
  begin = time.monotonic()
  try:
    values, scores = through(prepared, score)
    about = [row.about for row in prepared.rows.rows]
    samples = metrics.samples(about, _taken(scores))
  except FAILURES as error:
    result = failed(error)
    return Result(record(prepared, {}, 0.0) | result.record, [])
  seconds = time.monotonic() - begin
  return Result(record(prepared, values, seconds), samples)


def through_seqio(
  prepared: Sequence[Prepared], tokenizer: Any
) -> Callable[[Prepared, Score], tuple[dict, scoring.Scores]]:
  """Registers tasks and the mixture; returns what scores one through seqio.

  Args:
    prepared: the tasks; those of Table 1 make the mixture.
    tokenizer: of `nl_jax.data.tokenizers`.

  Raises:
    ModuleNotFoundError: seqio or TensorFlow is not installed.
  """
  tasks = _seqio_tasks()
  rows = {one.name: one.rows.rows for one in prepared}
  mixed = [name for name in rows if name in requests.TASKS]
  tasks.register(rows, tokenizer, mixed)

  def through(
    one: Prepared, score: Score
  ) -> tuple[dict[str, float], scoring.Scores]:
    longest = max(one.protocol.max_length, one.protocol.window)
    found = tasks.evaluate(tasks.name(one.name), longest, score)
    return found[tasks.name(one.name)]

  return through


def versions() -> dict[str, str]:
  """Of seqio and TensorFlow.

  Raises:
    ModuleNotFoundError: one is not installed.
  """
  return _seqio_tasks().VERSIONS


def _seqio_tasks() -> Any:
  """The module that needs seqio, imported here and nowhere else."""
  with _hushed():
    from nl_jax.eval import tasks
  return tasks


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
  """Nothing on stderr: TensorFlow tells of every library that is not here.

  Below Python: its C++ writes before it reads how much it shall say.
  """
  sys.stderr.flush()
  kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nothing, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nothing)


def direct(
  prepared: Prepared, score: Score
) -> tuple[dict[str, float], scoring.Scores]:
  """Metrics and scores of a task, without seqio."""
  rows = prepared.rows.rows
  scores = score([(row.inputs, row.targets) for row in rows])
  about = [row.about for row in rows]
  return metrics.of(prepared.name)(about, _taken(scores)), scores


def _taken(scores: scoring.Scores) -> metrics.Scores:
  """Scores in the form that seqio gives them to metrics."""
  return scores.lls, {"is_greedy": scores.is_greedy}


def record(
  prepared: Prepared, values: dict[str, float], seconds: float
) -> dict[str, Any]:
  """What a result file keeps of a task.

  Args:
    prepared: the task.
    values: metrics, each with its standard error.
    seconds: of scoring.
  """
  loaded, rows = prepared.loaded, prepared.rows
  return {
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


def failed(error: BaseException) -> Result:
  """The result of a task that failed."""
  said = sentence(error)
  return Result({"error": said, "metrics": {}, "warnings": []}, [])


def sentence(error: BaseException) -> str:
  """An error's first line."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
