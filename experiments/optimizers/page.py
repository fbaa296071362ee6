"""The page of an optimizer comparison: tables and a picture of its trials."""

import pathlib
import statistics

from experiments.cli import trials
from nl_jax import files


def value(result: dict) -> float:
  """What is compared: validation, or the online loss; NaN is worst."""
  value = result.get("validation", result.get("online"))
  return value if value == value else float("inf")


def _cells(results: list[dict]) -> dict[tuple, list[dict]]:
  """Runs over seeds, by (arm, rate, b1)."""
  cells = {}
  for r in results:
    cells.setdefault((r["arm"], r["rate"], r["b1"]), []).append(r)
  return cells


def _best_cells(results: list[dict]) -> list[tuple[dict, list[dict]]]:
  """(an arm's best setting, its runs over seeds), best mean first."""
  best = {}
  mean = lambda runs: statistics.fmean(map(value, runs))
  for (arm, *_), runs in _cells(results).items():
    # The cell with most seeds: others were run with the first one alone.
    key = (-len(runs), mean(runs))
    if arm not in best or key < best[arm][0]:
      best[arm] = (key, runs)
  rows = [runs for _, runs in best.values()]
  return sorted(((runs[0], runs) for runs in rows), key=lambda x: mean(x[1]))


def _cell(runs: list[dict], metric: str) -> str:
  values = [r[metric] for r in runs]
  spread = statistics.stdev(values) if len(values) > 1 else float("nan")
  return f"{statistics.fmean(values):.4f} ± {spread:.4f}"


def _table(results: list[dict], metrics: tuple[str, ...]) -> str:
  head = ["arm", "rate", "b1", "seeds", *metrics, "median over the grid"]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for setting, runs in _best_cells(results):
    every = [value(r) for r in results if r["arm"] == setting["arm"]]
    cells = [
      setting["arm"], f"{setting['rate']:g}", f"{setting['b1']:g}",
      str(len(runs)), *(_cell(runs, m) for m in metrics),
      f"{statistics.median(every):.4f}",
    ]  # fmt: skip
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _start_table(results: list[dict]) -> str:
  """Every setting of the public optimizers, best mean first."""
  mean = lambda cell: statistics.fmean(map(value, cell[1]))
  lines = ["| optimizer | b1 | seeds | validation |", "|---|---|---|---|"]
  for (arm, rate, b1), runs in sorted(_cells(results).items(), key=mean):
    cells = (f"`{arm}({rate:g})`", f"{b1:g}" if b1 else "–", str(len(runs)))
    lines.append(f"| {' | '.join(cells)} | {_cell(runs, 'validation')} |")
  return "\n".join(lines)


def _toy_tables(results: list[dict]) -> str:
  """One table for each set of columns, in the order of the problems."""
  tables = {}
  for result in results:
    for row in result["rows"]:
      tables.setdefault(tuple(row), []).append(row)
  show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
  parts = []
  for head, rows in tables.items():
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(show(r[k]) for k in head) + " |" for r in rows]
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def _plot(results: list[dict], path: pathlib.Path) -> bool:
  """Training loss of each arm's best setting; False without matplotlib."""
  try:
    import matplotlib
  except ModuleNotFoundError:
    return False
  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4))
  for setting, runs in _best_cells(results):
    curve = [statistics.fmean(x) for x in zip(*(r["curve"] for r in runs))]
    steps = [i * setting["every"] for i in range(len(curve))]
    axes.plot(steps, curve, label=f"{setting['arm']} ({setting['rate']:g})")
  axes.set(xlabel="step", ylabel="training loss, nat per byte", yscale="log")
  axes.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  return True


_INTRO = """# Optimizers compared

Best rate of each arm's own grid, mean ± standard deviation over seeds (weights
and data order together). Lower is better. A difference below the spread over
seeds is none, and one of arms with unequal grids is not evidence. What these
figures do not show is not claimed: see docs/optimizers.md.
"""


def page(folder: pathlib.Path, plot: pathlib.Path) -> str:
  """The page of all results that lie in the folder."""
  parts = [_INTRO]
  command = "python -m experiments.optimizers --suite="
  lm, stream = trials.held(folder / "lm"), trials.held(folder / "topics")
  starts = trials.held(folder / "start")
  if lm:
    parts.append(
      f"## Byte language model, validation loss in nat per byte\n\n"
      f"`{command}lm`; {_text_of(lm)}.\n\n"
      + _table(lm, ("validation", "seconds"))
    )
    if _plot(lm, plot):
      parts.append(f"![training loss]({plot.name})")
  if starts:
    parts.append(
      "## The public optimizers, at the rates to start with\n\n"
      f"`{command}start`; the byte model above, {_text_of(starts)}.\n"
      "The optimizer gets all leaves and has its defaults.\n\n"
      + _start_table(starts)
    )
  if stream:
    parts.append(
      f"## Topic stream\n\n`{command}topics`; {_text_of(stream)}.\n"
      "Compare retention at equal online loss only: the rate moves it most.\n\n"
      + _table(stream, ("online", "retention", "forgetting", "recovery"))
    )
  toys = _toys(folder / "toys")
  if toys:
    parts.append(f"## Toy problems\n\n`{command}toys`\n\n" + _toy_tables(toys))
  return "\n\n".join(parts) + "\n"


def _text_of(results: list[dict]) -> str:
  """What the trials read; all of a folder read the same."""
  return results[0].get("text", "of a text that the trials do not name")


def _toys(folder: pathlib.Path) -> list[dict]:
  """What lies in the folder, in the order of the problems."""
  from experiments.optimizers import toys as toys_lib

  paths = (folder / f"{name}.json" for name in toys_lib.PROBLEMS)
  return [files.read_json(path) for path in paths if path.exists()]
