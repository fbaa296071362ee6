"""Needles by depth and length, as a picture."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from nl_jax import files

# Readable on every colour.
_LABEL = dict(boxstyle="round,pad=0.2", facecolor="white", edgecolor="none")


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Two maps: how often the answer was found, and how much it surprised.

  Args:
    result: of `needles.run`.
    path: of the PNG.
  """
  from nl_jax.report import charts

  cells = result["cells"]
  lengths = sorted({cell["length"] for cell in cells})
  depths = sorted({_depth(cell) for cell in cells})
  height = 1.6 + 0.42 * len(depths)
  figure = charts.new_figure((10.0, height))
  found, surprise = figure.subplots(1, 2)
  about = result["about"]["model"]
  name = charts.plain(_name(about))
  figure.suptitle(
    f"{result['task']}: {name} at step {about['step']}, trained at "
    f"{about['trained_length']} tokens; {result['about']['samples']} questions "
    "a cell",
    fontsize=10,
  )
  maps = (
    (found, "match", 100.0, "found (%)", (0, 100), "RdYlGn"),
    (
      surprise,
      "nats",
      1.0,
      "nat per token of the answer",
      (0, None),
      "Oranges",
    ),
  )
  for axes, key, scale, title, (low, high), colours in maps:
    grid = [[math.nan] * len(lengths) for _ in depths]
    for cell in cells:
      row, column = depths.index(_depth(cell)), lengths.index(cell["length"])
      grid[row][column] = scale * cell[key]
    axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for row, values in enumerate(grid):
      for column, value in enumerate(values):
        text = f"{value:.0f}" if scale > 1 else f"{value:.2f}"
        axes.text(
          column, row, text, ha="center", va="center", fontsize=8, bbox=_LABEL
        )
    axes.set_xticks(range(len(lengths)), [f"{x:,}" for x in lengths])
    names = ["drawn" if d < 0 else f"{d:g} %" for d in depths]
    axes.set_yticks(range(len(depths)), names)
    axes.set_xlabel("tokens of prompt and answer")
    axes.set_title(title, fontsize=10, loc="left")
  found.set_ylabel("depth of the needle")
  with files.replacing(path) as file:
    figure.savefig(file, format="png", dpi=90, facecolor="white")


def _depth(cell: Mapping[str, Any]) -> float:
  """A number to sort by; drawn depths come first."""
  return -1.0 if cell["depth"] is None else cell["depth"]


def _name(about: Mapping[str, Any]) -> str:
  """Of a run its folder, which is mostly named as its config."""
  return pathlib.Path(about["workdir"]).name or about["arch"]
