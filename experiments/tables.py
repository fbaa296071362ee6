"""Renders stored results as a Markdown table, next to the paper's rows.

    python -m experiments.tables --results=runs/a/table1_300.json,runs/b
    python -m experiments.tables --results=runs/a --plot=sweep.png
    python -m experiments.tables --study=runs/studies/tiny_table

A folder stands for all results of experiments.table1 below it. Nothing is
scored: what is shown is in the files. --plot draws each column over the steps
of the checkpoints that were scored, a curve a run. --study renders what
experiments.study has trained so far, and its picture beside the runs.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.cli import command

_RESULTS = flags.DEFINE_list("results", [], "Result files, or folders of them.")
_PLOT = flags.DEFINE_string("plot", "", "A picture of the sweep, to be made.")
_STUDY = flags.DEFINE_string("study", "", "Folder of a study of tiny runs.")


def main() -> int:
  """Runs the command; returns its exit status."""
  if _STUDY.value:
    from experiments.study import studies

    if _RESULTS.value or _PLOT.value:
      raise ValueError("--study stands alone: it has its own table and picture")
    print(studies.tell(pathlib.Path(_STUDY.value)))
    return command.DONE
  if not _RESULTS.value:
    raise ValueError("--results is required: result files, or folders of them")
  from experiments.table1 import result as result_lib

  paths = [path for name in _RESULTS.value for path in _paths(name)]
  results = [result_lib.read(path) for path in paths]
  print("\n".join(_markdown(results)))
  if _PLOT.value:
    _draw(results, pathlib.Path(_PLOT.value))
    command.say(f"picture: {_PLOT.value}")
  return command.DONE


def _paths(name: str) -> list[pathlib.Path]:
  """A file, or the results of a folder, oldest step first."""
  path = pathlib.Path(name)
  if not path.is_dir():
    return [path]
  found = sorted(path.glob("**/table1_*.json"), key=_order)
  if not found:
    raise FileNotFoundError(
      f"no results (table1_*.json) in {path}: `python -m experiments.table1` "
      "makes them"
    )
  return found


def _order(path: pathlib.Path) -> tuple[str, int, str]:
  step = path.stem.removeprefix("table1_")
  return str(path.parent), int(step) if step.isdigit() else 0, step


def _markdown(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """The table of all results and the paper's rows, and what it is of."""
  from nl_jax.eval import report

  shown, printed = [], []
  for result in results:
    row, others = report.reference(result)
    shown += [report.ours(result), report.errors(result)]
    printed += [x for x in ([row] if row else []) + others if x not in printed]
  notes = _notes(results)
  table = report.markdown([*shown, *map(report.paper, printed)])
  return [table, "", *(f"- {note}" for note in notes)]


def _notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
  """What the numbers are of; what is not of all results names its own."""
  from nl_jax.eval import report

  by_result = [(report.label(r), report.footer(r)) for r in results]
  shared = [
    note for note in by_result[0][1] if all(note in x for _, x in by_result)
  ]
  own = [
    f"{name}: {note}"
    for name, notes in by_result
    for note in notes
    if note not in shared
  ]
  return own + shared


def _draw(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """A panel a column, a curve a run, and the printed value where one is."""
  from nl_jax.eval import table
  from nl_jax.report import charts

  runs: dict[str, list[Mapping[str, Any]]] = {}
  for result in sorted(results, key=lambda result: result["model"]["step"]):
    model = result["model"]
    runs.setdefault(model["workdir"] or model["config"], []).append(result)
  panels = [_panel(column, runs) for column in table.COLUMNS]
  panels = [panel for panel in panels if panel.curves]
  if not panels:
    raise ValueError("--plot: no result has a number to draw")
  charts.png(panels, "Table 1 over training", path)


def _panel(column: Any, runs: Mapping[str, Sequence[Mapping]]) -> Any:
  """A column of the table over steps; its title has the marks of its cells."""
  from nl_jax.eval import report, table
  from nl_jax.report import charts

  curves, marks = {}, ""
  for number, (name, of_run) in enumerate(runs.items()):
    cells = [(r["model"]["step"], table.cells(r).get(column.key))
             for r in of_run]  # fmt: skip
    points = [(step, cell) for step, cell in cells if cell]
    if not points:
      continue
    xs, ys = [x for x, _ in points], [cell.value for _, cell in points]
    curves[name] = charts.Curve(name, xs, ys, number)
    marks += "".join(cell.marks for _, cell in points)
    row, _ = report.reference(of_run[0])
    if row and len(xs) > 1:
      label = f"{row.model} {row.size}, {row.source}"
      ends, value = [xs[0], xs[-1]], row.values[column.key]
      curves.setdefault(
        label, charts.Curve(label, ends, [value] * 2, number, 1)
      )
  marked = "".join(mark for mark in table.MARKS if mark in marks)
  title = f"{column.title} {marked}".strip()
  log = column.scale == 1.0
  return charts.Panel(title, "step", list(curves.values()), log)


if __name__ == "__main__":
  command.run(main)
