"""The charts of a report: one drawing function, many panels."""

import io
import itertools
import math
import pathlib
from typing import Any, NamedTuple

from nl_jax import files
from nl_jax.report import runs as runs_lib

# Both readable on white and on near-black.
COLOURS = (
  "#3b7dd8", "#e07b39", "#2a9d68", "#c44e8b", "#8a6fd1", "#b8912b", "#4aa6b5",
)  # fmt: skip
_INK = "#7d858f"
_LONGEST = 120  # Characters of a text that is drawn.
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "^", "s", "x")
_FEW = 8  # Points that have no running mean.
_CLOSE = 0.01  # Of the height of a panel: lines so near lie on each other.


def plain(text: str) -> str:
  """A text from outside, to be drawn as it is.

  Matplotlib takes what stands between two "$" for mathematics, and leaves a
  line out of the legend whose label begins with "_".
  """
  known = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
  text = "".join(known)
  if len(text) > _LONGEST:
    text = text[: _LONGEST // 2] + " … " + text[-_LONGEST // 2 :]
  text = text.replace("$", r"\$")
  return f" {text}" if text.startswith("_") else text


class Curve(NamedTuple):
  """A line of a panel.

  Attributes:
    label: in the legend; "" for none.
    xs, ys: numbers; nan is a gap.
    run: number of the run: its colour.
    style: number of the kind of line or dot.
    dots: whether the points are not joined.
    marks: whether the points of a line are marked.
    faint: it lies behind another one, its mean.
    colour: number of the colour; None: by run, of one run by place.
  """

  label: str
  xs: list
  ys: list
  run: int
  style: int = 0
  dots: bool = False
  marks: bool = False
  faint: bool = False
  colour: int | None = None


class Panel(NamedTuple):
  """One chart.

  Attributes:
    title: what is shown, with its unit.
    x: label of the x axis.
    curves: the lines.
    log: whether the y axis is logarithmic.
    changes: where the config of a run changed: upright lines.
  """

  title: str
  x: str
  curves: list[Curve]
  log: bool = False
  changes: tuple[float, ...] = ()


def panels(runs: list[runs_lib.Run]) -> list[Panel]:
  """All charts that the runs have something to show in."""
  made = [
    *_losses(runs, "tokens", "tokens"),
    *_losses(runs, "seconds", "seconds of training"),
    *_levels(runs),
    *_optimizer(runs),
    *_speed(runs),
  ]
  return [panel for panel in made if panel.curves]


def _losses(runs: list[runs_lib.Run], x: str, label: str) -> list[Panel]:
  """A panel for each tokenizer: a nat per token of others means another one."""
  groups = runs_lib.by_tokenizer(runs)
  made: list[Panel] = []
  for name, numbers in groups.items():
    title = f"Loss over {label} (nat per token)"
    if len(groups) > 1:
      title = f"Loss (nat per token of {name})"
    curves, changes = [], []
    for i in numbers:
      curves += _loss(runs, i, x, 2 * len(made) if len(groups) > 1 else 0)
      changes += runs[i].changed_at(x)
    made.append(Panel(title, label, curves, changes=tuple(changes)))
  return made


def _loss(
  runs: list[runs_lib.Run], number: int, x: str, first: int
) -> list[Curve]:
  """Training loss as it was, its running mean, and validation."""
  run, alone = runs[number], len(runs) == 1
  colour = first if alone else number
  name = _name(runs, run, "train")
  curves = _curve(run, number, "train/loss", x, name)
  if curves:
    mean = running_mean(curves[0].ys)
    if mean:
      raw = curves[0]._replace(label="", faint=True, colour=colour)
      curves = [raw, raw._replace(label=name, ys=mean, faint=False)]
    else:
      curves = [curves[0]._replace(colour=colour)]
  keys = [key for key in run.keys("eval/") if key.endswith("/loss")]
  for j, key in enumerate(keys):
    name = _name(runs, run, key.split("/")[1])
    found = _curve(run, number, key, x, name, style=j + 1)
    colour = j + 1 if alone else number
    curves += [c._replace(marks=True, colour=colour) for c in found]
  return curves


def running_mean(ys: list[float]) -> list[float] | None:
  """Means over about a 15th of the points, centred; gaps stay gaps.

  Towards both ends fewer points are taken, as many before as after. None where
  there are too few to have a mean.
  """
  count = len(ys)
  if count < _FEW:
    return None
  known = [math.isfinite(y) for y in ys]
  sums = [
    0.0,
    *itertools.accumulate(y if k else 0.0 for y, k in zip(ys, known)),
  ]
  counts = [0, *itertools.accumulate(map(int, known))]
  means = []
  for i in range(count):
    reach = min(max(1, count // 30), i, count - 1 - i)
    low, high = i - reach, i + reach + 1
    mean = (sums[high] - sums[low]) / max(counts[high] - counts[low], 1)
    means.append(mean if known[i] else math.nan)
  return means


def _curve(
  run: runs_lib.Run,
  number: int,
  key: str,
  x: str,
  label: str,
  style: int = 0,
  dots: bool = False,
) -> list[Curve]:
  xs, ys = run.series(key, x)
  known = any(math.isfinite(y) for y in ys)
  return [Curve(label, xs, ys, number, style, dots)] if known else []


def _levels(runs: list[runs_lib.Run]) -> list[Panel]:
  """Inner loss, norms and gates of the memories."""
  kinds = (
    ("inner_loss", "Inner loss of the memories (surprise)", False),
    ("memory_norm", "Norm of the fast weights", False),
    ("update_norm", "Norm of a write (per token)", True),
  )
  made = []
  for field, title, log in kinds:
    curves = []
    for i, run in enumerate(runs):
      for j, level in enumerate(run.levels()):
        key = f"memory/{level}/{field}"
        curves += _curve(run, i, key, "tokens", _name(runs, run, level), j)
    made.append(Panel(title, "tokens", curves, log))
  for field, title in (
    ("eta_mean", "Learning rate of the memories (mean gate)"),
    ("alpha_mean", "Retention of the memories (mean gate)"),
    ("beta_mean", "Momentum of the memories (mean gate)"),
  ):
    curves = []
    for i, run in enumerate(runs):
      for j, level in enumerate(run.levels()):
        key = f"memory/{level}/{field}"
        if any(y > 0 for y in run.series(key)[1]):
          curves += _curve(run, i, key, "tokens", _name(runs, run, level), j)
    made.append(Panel(title, "tokens", curves))
  return made


def _optimizer(runs: list[runs_lib.Run]) -> list[Panel]:
  norms, updates, rates = [], [], []
  for i, run in enumerate(runs):
    norms += _curve(run, i, "opt/grad_norm", "tokens", run.name)
    rates += _curve(run, i, "opt/learning_rate", "tokens", run.name)
    keys = [k for k in run.keys("opt/") if k.endswith("/update_norm")]
    keys = [k for k in keys if k != "opt/update_norm"] or ["opt/update_norm"]
    for j, key in enumerate(keys):
      level = key.removeprefix("opt/").removesuffix("update_norm").strip("/")
      name = _name(runs, run, level or "all")
      # Between two updates of a level its norm is 0: dots, not lines.
      xs, ys = run.series(key)
      ys = [y if y > 0 else math.nan for y in ys]
      if any(math.isfinite(y) for y in ys):
        dots = level.startswith("cms")
        updates.append(Curve(name, xs, ys, i, j, dots))
  return [
    Panel("Norm of the outer gradient", "tokens", norms, True),
    Panel("Norm of an outer update, by level", "tokens", updates, True),
    Panel("Outer learning rate", "tokens", rates),
  ]


def _speed(runs: list[runs_lib.Run]) -> list[Panel]:
  speed, wait = [], []
  for i, run in enumerate(runs):
    speed += _curve(run, i, "perf/tokens_per_s", "tokens", run.name)
    xs, ys = run.series("perf/data_wait")
    wait.append(Curve(run.name, xs, [100 * y for y in ys], i))
  return [
    Panel("Tokens per second", "tokens", speed),
    Panel("Time spent waiting for data (%)", "tokens", wait),
  ]


def _name(runs: list[runs_lib.Run], run: runs_lib.Run, part: str) -> str:
  return part if len(runs) == 1 else f"{run.name}, {part}"


def draw(axes: Any, panel: Panel, ink: str) -> None:
  """One panel on matplotlib axes."""
  alone = len({curve.run for curve in panel.curves}) == 1
  for x in panel.changes:
    axes.axvline(x, color=ink, linewidth=0.8, linestyle=":")
  under = covered(panel)
  for number, curve in enumerate(panel.curves):
    place = number if alone else curve.run
    place = place if curve.colour is None else curve.colour
    look = dict(linestyle=_STYLES[curve.style % 4], linewidth=1.4)
    if curve.faint:
      look |= dict(alpha=0.35, linewidth=0.8)
    if number in under:  # A band, seen on both sides of the lines on it.
      width = 2.0 + 2.5 * min(under[number], 2)
      look |= dict(alpha=0.45, linewidth=width, linestyle="-")
    marker = _MARKERS[curve.style % len(_MARKERS)]
    if curve.dots:
      look = dict(linestyle="none", marker=marker, markersize=3.5)
    elif len(curve.xs) == 1:
      look = dict(linestyle="none", marker="s", markersize=4)
    elif curve.marks:
      look |= dict(marker=marker, markersize=3.5)
    colour = COLOURS[place % len(COLOURS)]
    # A label that begins so is left out of legends by matplotlib.
    label = plain(curve.label) or "_nolegend_"
    axes.plot(curve.xs, curve.ys, color=colour, label=label, **look)
  axes.set_title(plain(panel.title), fontsize=10, color=ink, loc="left", pad=8)
  axes.set_xlabel(panel.x, fontsize=8, color=ink)
  if panel.log:
    axes.set_yscale("log")
  axes.xaxis.set_major_formatter(_engineering())
  axes.tick_params(labelsize=8, colors=ink, which="both")
  axes.grid(True, color=ink, alpha=0.22, linewidth=0.6)
  for side, spine in axes.spines.items():
    spine.set_visible(side in ("left", "bottom"))
    spine.set_color(ink)
  axes.patch.set_alpha(0)
  if sum(bool(curve.label) for curve in panel.curves) > 1:
    axes.legend(fontsize=7, frameon=False, labelcolor=ink, loc="best", ncols=1)


def covered(panel: Panel) -> dict[int, int]:
  """How many later lines lie on a line, all along; by its number."""
  lines = [
    (number, dict(zip(curve.xs, curve.ys)))
    for number, curve in enumerate(panel.curves)
    if not curve.dots and not curve.faint and len(curve.xs) > 1
  ]
  values = [y for _, line in lines for y in line.values() if math.isfinite(y)]
  near = _CLOSE * (max(values) - min(values)) if values else 0.0
  found: dict[int, int] = {}
  for i, (number, line) in enumerate(lines):
    for _, other in lines[i + 1 :]:
      shared = [x for x in line if x in other]
      gaps = [abs(line[x] - other[x]) for x in shared]
      if len(shared) > 1 and all(not gap > near for gap in gaps):
        found[number] = found.get(number, 0) + 1
  return found


def _engineering() -> Any:
  from matplotlib import ticker

  return ticker.EngFormatter(sep="")


def svg(panel: Panel) -> str:
  """A panel as an SVG element, without background."""
  figure = new_figure((6.0, 3.1))
  draw(figure.add_subplot(), panel, _INK)
  text = io.StringIO()
  # No date: the same run gives the same page.
  figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
  source = text.getvalue()
  return source[source.index("<svg") :]


def png(shown: list[Panel], title: str, path: Any) -> None:
  """All panels as one picture."""
  columns = 2
  rows = math.ceil(len(shown) / columns)
  figure = new_figure((12.0, 3.2 * rows + 0.6))
  ink = "#333a42"
  for number, panel in enumerate(shown):
    draw(figure.add_subplot(rows, columns, number + 1), panel, ink)
  figure.suptitle(plain(title), fontsize=13, color=ink, x=0.01, ha="left")
  figure.savefig(path, format="png", dpi=110, facecolor="white")


def save(shown: list[Panel], title: str, path: pathlib.Path) -> None:
  """`png` into a file that is whole or not there.

  Raises:
    StorageError: the system refuses.
  """
  with files.writing(path), files.replacing(path) as file:
    png(shown, title, file)


def dots(values: dict[str, list[float]], title: str, path: Any) -> None:
  """A line a row, least first: its values and their mean; a PNG.

  Args:
    values: by row.
    title: what they are, with the unit.
    path: of the picture.
  """
  ordered = sorted(values.items(), key=lambda x: -sum(x[1]) / len(x[1]))
  figure = new_figure((9.0, 0.6 + 0.32 * len(ordered)))
  axes = figure.subplots()
  axes.grid(axis="y", alpha=0.35)
  axes.set_axisbelow(True)
  for place, (_, found) in enumerate(ordered):
    mean = sum(found) / len(found)
    axes.plot(found, [place] * len(found), "o", color=_INK, markersize=4)
    axes.plot(mean, place, "|", color=COLOURS[0], markersize=16, mew=2.5)
    axes.annotate(
      f"{mean:.3f}", (max(found), place), (10, 0), va="center", fontsize=8,
      textcoords="offset points",
    )  # fmt: skip
  axes.set_yticks(range(len(ordered)), [plain(name) for name, _ in ordered])
  axes.margins(x=0.08)
  title = f"{plain(title)}: each seed, and the mean"
  axes.set_title(title, fontsize=10, loc="left")
  figure.savefig(path, format="png", dpi=110, facecolor="white")


def new_figure(size: tuple[float, float]) -> Any:
  """A figure that needs no display."""
  import matplotlib
  from matplotlib import figure
  from matplotlib.backends import backend_agg

  # Text stays text; names of elements do not depend on chance.
  matplotlib.rcParams["svg.fonttype"] = "none"
  matplotlib.rcParams["svg.hashsalt"] = "nl_jax"
  made = figure.Figure(figsize=size, layout="constrained")
  backend_agg.FigureCanvasAgg(made)
  return made
