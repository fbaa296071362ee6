"""A result beside the published rows, as text or Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nl_jax.eval import table

MISSING = "--"
_TITLES = ("model", *(c.title for c in table.COLUMNS), "Avg")
_KEYS = (*(c.key for c in table.COLUMNS), table.AVERAGE)


class Line(NamedTuple):
  """A row as it is shown.

  Attributes:
    name: its first cell.
    cells: text by column; one that is not there was not measured.
  """

  name: str
  cells: dict[str, str]


def lines(
  result: Mapping[str, Any], further: Sequence[Mapping[str, Any]] = ()
) -> list[Line]:
  """Ours, its standard errors, the published row, the difference, the rest.

  Args:
    result: of a result file.
    further: results to show below.
  """
  found = table.cells(result)
  shown = [ours(result), errors(result)]
  printed, others = reference(result)
  if printed:
    away = table.differences(found, printed)
    signed = {k: f"{'+' if x > 0 else ''}{number(x)}" for k, x in away.items()}
    shown += [paper(printed), Line("difference", signed)]
  shown += [paper(row) for row in others]
  return shown + [ours(other) for other in further]


def ours(result: Mapping[str, Any]) -> Line:
  """The row of a result."""
  found = table.cells(result)
  shown = {key: number(c.value) + c.marks for key, c in found.items()}
  return Line(label(result), shown)


def label(result: Mapping[str, Any]) -> str:
  """The run, its step and the tokens that it has seen."""
  model = result["model"]
  if model["random_init"]:
    return f"{model['config']}, random weights"
  seen = _short(model["tokens_trained"])
  return f"{model['config']}, step {model['step']}, {seen} tokens"


def paper(row: table.Published) -> Line:
  """A published row, with its source."""
  shown = {key: f"{value:.2f}" for key, value in row.values.items()}
  return Line(f"{row.model} {row.size}/{_tokens(row)} [{row.source}]", shown)


def errors(result: Mapping[str, Any]) -> Line:
  """The standard errors of a result's cells."""
  found = table.cells(result)
  known = {key: c.stderr for key, c in found.items() if c.stderr is not None}
  return Line("± standard error", {k: number(e) for k, e in known.items()})


def reference(
  result: Mapping[str, Any],
) -> tuple[table.Published | None, list[table.Published]]:
  """The published row that a result is compared with, and its baselines."""
  model = result["model"]
  return table.reference(
    model["arch"], model["parameters"], result["reference"]["version"]
  )


def _tokens(row: table.Published) -> str:
  return row.tokens.partition("(")[0]


def number(value: float) -> str:
  """Two decimals; large perplexities as powers of ten."""
  return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.2e}"


def footer(result: Mapping[str, Any]) -> list[str]:
  """Sentences below a table: what was measured how, and what is not alike."""
  protocol, model = result["protocol"], result["model"]
  windows = ", ".join(map(str, protocol["wiki_max_length"]))
  said = [
    f"tokenizer {result['tokenizer']['name']} "
    f"({result['tokenizer']['vocab_size']} ids), bos {protocol['bos']}, "
    f"max_length {protocol['max_length']}, wiki windows {windows} (the first "
    f"is shown), state {protocol['state_policy']}, "
    f"memorise {protocol['memorise']}",
    "data: "
    + ", ".join(
      f"{name} {task['fidelity']} {task['n_docs']}/{task['n_docs_expected']}"
      for name, task in result["tasks"].items()
      if "fidelity" in task
    ),
    *_lengths(result),
    *_failed(result),
  ]
  printed, _ = reference(result)
  if printed:
    said.append(
      f"trained on {_short(model['tokens_trained'])} tokens with "
      f"{_short(model['parameters'])} parameters, the paper's row on "
      f"{_tokens(printed)} with {printed.size}"
    )
  else:
    said.append("no published row of this model")
  used = "".join(cell.marks for cell in table.cells(result).values())
  said += [f"{mark} {why}" for mark, why in table.MARKS.items() if mark in used]
  said.append(
    "standard errors are of sampling documents, not of seeds; the average is "
    "shown when all eight accuracies were measured on complete exact data"
  )
  return said


def _failed(result: Mapping[str, Any]) -> list[str]:
  """Why a task has no number."""
  return [
    f"{name} failed: {task['error']}"
    for name, task in result["tasks"].items()
    if "error" in task
  ]


def _lengths(result: Mapping[str, Any]) -> list[str]:
  """Rows that were cut, and lengths beyond the trained one."""
  cut = {
    name: task["n_truncated"]
    for name, task in result["tasks"].items()
    if task.get("n_truncated")
  }
  said = []
  if cut:
    rows = ", ".join(f"{name} {count}" for name, count in cut.items())
    said.append(f"rows cut on the left to max_length: {rows}")
  trained = result["model"]["sequence_length"]
  if result["protocol"]["max_length"] > trained:
    said.append(f"requests may be longer than the {trained} tokens trained on")
  return said


def text(shown: Sequence[Line]) -> str:
  """The table in columns of equal width."""
  rows = [_TITLES, *(_cells(line) for line in shown)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in rows
  )


def markdown(shown: Sequence[Line]) -> str:
  """The table in Markdown."""
  rule = ["---", *["---:"] * (len(_TITLES) - 1)]
  rows = [_TITLES, rule, *(_cells(line) for line in shown)]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(line: Line) -> list[str]:
  return [line.name, *(line.cells.get(key, MISSING) for key in _KEYS)]


def _short(value: float) -> str:
  """Three digits and a unit: 30B, 1.2M."""
  if not value:
    return "0"
  for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      digits = max(0, 2 - int(math.log10(value / size)))
      return f"{value / size:.{digits}f}{unit}"
  return f"{value:.0f}"
