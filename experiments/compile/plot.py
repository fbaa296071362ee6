"""A picture of compile reports: the time of a step over the length of a row."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from nl_jax.report import charts

Points = dict[str, dict[int, float]]


def read(paths: Sequence[str]) -> Points:
  """Seconds of a train step by bundles, by config and tokens of a row.

  Args:
    paths: reports as `experiments.compile --output` writes them.

  Raises:
    ValueError: a file that is not a report, or one for several slices.
  """
  points: Points = {}
  for path in paths:
    try:
      made = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
      config, (report,) = made["about"]["config"], made["reports"]
      (train,) = (p for p in report["programs"] if p["program"] == "train")
      seconds = train["schedule"]["seconds"]
      length = report["batch"][1]
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{path} is not a report of a train step on one slice, as "
        "`experiments.compile --output` writes it"
      ) from error
    points.setdefault(config, {})[length] = seconds
  return points


def draw(points: Points, title: str, path: Any) -> None:
  """Seconds of a step, and the same over those of the first config; a PNG.

  Args:
    points: of `read`.
    title: of the picture.
    path: of the file.
  """
  figure = charts.new_figure((11.0, 4.0))
  base = next(iter(points.values()))
  panels = (
    ("a step by bundles, seconds", lambda length, seconds: seconds),
    (
      f"the same, of {next(iter(points))} = 1",
      lambda length, seconds: seconds / base.get(length, float("nan")),
    ),
  )
  for place, (label, of) in enumerate(panels):
    axes = figure.add_subplot(1, 2, place + 1)
    for number, (config, found) in enumerate(points.items()):
      xs = sorted(found)
      ys = [of(x, found[x]) for x in xs]
      colour = charts.COLOURS[number % len(charts.COLOURS)]
      axes.plot(xs, ys, "o-", color=colour, label=charts.plain(config))
    axes.set_xscale("log", base=2)
    lengths = sorted({x for found in points.values() for x in found})
    axes.set_xticks(lengths, [f"{x // 1024}K" for x in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a row")
    axes.set_title(label, fontsize=10, loc="left")
    axes.grid(alpha=0.35)
  axes.legend(fontsize=8)
  figure.suptitle(charts.plain(title), fontsize=12, x=0.01, ha="left")
  figure.savefig(path, format="png", dpi=110, facecolor="white")
