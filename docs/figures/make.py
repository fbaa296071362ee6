"""Draws the figures of README and docs, each for light and dark pages.

    python docs/figures/make.py

`levels` shows how often each level of HOPE changes, by the periods of its
configs; `results` the tables of docs/results.md, which it reads.
"""

import dataclasses
import pathlib
import re

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of one kind of page.

  Attributes:
    name: in the file's name.
    paper, ink, faint: background, text, and lines that stand back.
    first, second: of what is compared.
  """

  name: str
  paper: str
  ink: str
  faint: str
  first: str
  second: str


THEMES = (
  Theme("light", "#ffffff", "#1f2328", "#d1d9e0", "#2166ac", "#c2570c"),
  Theme("dark", "#0d1117", "#e6edf3", "#3d444d", "#6cb6ff", "#f0a35e"),
)

# (name, what it sees, tokens between two updates, changes while reading).
# Periods: HOPE at the paper's sizes, a step of 2^19 tokens.
LEVELS = (
  ("attention cache", "tokens", 1, True),
  ("self-modifying memories", "tokens", 64, True),
  ("feed-forward, high, in context", "tokens", 512, True),
  ("feed-forward, mid, in context", "tokens", 2048, True),
  ("slow weights and momentum", "batches, gradients", 2**19, False),
  ("feed-forward, high", "batches", 2**20, False),
  ("feed-forward, mid", "batches", 2**22, False),
  ("feed-forward, low", "batches", 2**24, False),
)
_END = 2**27


def _style(theme: Theme) -> dict[str, str | float | bool]:
  return {
    "svg.hashsalt": "nl_jax",
    "font.size": 10.0,
    "figure.facecolor": theme.paper,
    "axes.facecolor": theme.paper,
    "savefig.facecolor": theme.paper,
    "text.color": theme.ink,
    "axes.labelcolor": theme.ink,
    "axes.edgecolor": theme.faint,
    "xtick.color": theme.ink,
    "ytick.color": theme.ink,
    "axes.spines.top": False,
    "axes.spines.right": False,
  }


def _tokens(count: int) -> str:
  for unit, size in (("M", 2**20), ("K", 2**10)):
    if count >= size:
      return f"{count // size}{unit} tokens"
  return f"{count} tokens" if count > 1 else "token"


def levels(theme: Theme) -> plt.Figure:
  """A row a level: a line at each of its updates, over the tokens read."""
  figure, axes = plt.subplots(figsize=(9.2, 4.3), layout="constrained")
  for row, (name, sees, period, reading) in enumerate(LEVELS):
    color = theme.first if reading else theme.second
    updates, last = [], 0.0
    for i in range(1, 200):
      # Lines that would touch are left out; the rest is a bar.
      if i == 1 or i * period > last * 1.12:
        updates.append(i * period)
        last = i * period
    updates = [x for x in updates if x < _END]
    axes.barh(row, _END - period, left=period, height=0.42, color=color,
              alpha=0.18, lw=0)  # fmt: skip
    axes.vlines(updates, row - 0.21, row + 0.21, color=color, lw=1.3)
    axes.text(0.55, row, name, ha="right", va="center", weight="bold")
    said = f"sees {sees}; changes every {_tokens(period)}"
    if period < 2**14:
      axes.text(period * 1.15, row + 0.36, said, va="center", size=8)
    else:
      axes.text(period / 1.2, row, said, ha="right", va="center", size=8)
  axes.set_xscale("log", base=2)
  axes.set_xlim(0.8, _END)
  axes.set_ylim(len(LEVELS) - 0.4, -0.7)
  axes.set_yticks([])
  axes.spines["left"].set_visible(False)
  ticks = [1, 2**6, 2**11, 2**19, 2**24]
  axes.set_xticks(ticks, ["1", "64", "2K", "512K\n(a training step)", "16M"])
  axes.set_xlabel("tokens seen (logarithmic)")
  axes.set_title(
    "Levels of one model: each changes at its own period", loc="left",
    weight="bold",
  )  # fmt: skip
  for text, color in (
    ("change while a text is read", theme.first),
    ("change in training only", theme.second),
  ):
    axes.plot([], [], color=color, lw=6, alpha=0.7, label=text)
  axes.legend(loc="lower left", frameon=False, labelcolor=theme.ink)
  return figure


def _table(section: str, columns: int) -> list[list[str]]:
  """Rows of the first table below a heading of docs/results.md."""
  text = (HERE.parent / "results.md").read_text("utf-8")
  part = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in part.splitlines()
    if line.startswith("| `")
  ]
  return [row for row in rows if len(row) == columns]


def _losses(axes: Axes, theme: Theme) -> None:
  rows = _table("Tiny models on the embedded corpus", 6)
  for y, row in enumerate(rows):
    name = row[0].strip("`").removesuffix("_tiny")
    mean, spread = map(float, re.findall(r"[\d.]+", row[3])[:2])
    ours = name.startswith("hope")
    color = theme.first if ours else theme.ink
    axes.errorbar(mean, y, xerr=spread, fmt="o", ms=5, color=color, lw=1.3)
    axes.text(1.335, y, name, ha="right", va="center", color=color, size=9,
              weight="bold" if ours else "normal")  # fmt: skip
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_xlim(1.35, 2.15)
  axes.set_yticks([])
  axes.grid(axis="x", color=theme.faint, lw=0.6)
  axes.set_xlabel("validation loss, nat per byte (lower is better)")
  axes.set_title("0.44M parameters, 0.6M tokens, 3 seeds", loc="left", size=10)


def _times(axes: Axes, theme: Theme) -> None:
  rows = _table("Every mixer against attention, as the text grows", 8)
  rows.sort(key=lambda row: float(row[4]))
  for y, row in enumerate(rows):
    name = re.match(r"`(\w+)`", row[0])[1]
    short, long = float(row[1]), float(row[4])
    axes.plot([short, long], [y, y], color=theme.faint, lw=1.5, zorder=1)
    axes.plot(short, y, "o", ms=5, color=theme.second, zorder=2)
    axes.plot(long, y, "o", ms=5, color=theme.first, zorder=2)
    ours = name.startswith("hope")
    axes.text(0.036, y, name, ha="right", va="center", size=9,
              weight="bold" if ours else "normal")  # fmt: skip
  axes.axvline(1.0, color=theme.ink, lw=0.8, ls=":")
  axes.text(1.08, -0.95, "attention", va="bottom", size=8)
  axes.plot([], [], "o", color=theme.second, label="text of 512 tokens")
  axes.plot([], [], "o", color=theme.first, label="16K tokens")
  axes.legend(
    frameon=False, labelcolor=theme.ink, loc="upper right", fontsize=8
  )
  axes.set_xscale("log")
  axes.set_xlim(0.04, 60)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_yticks([])
  axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
  axes.set_xlabel("time of a gradient, ratio to attention (CPU)")
  axes.set_title("What a layer costs", loc="left", size=10)


def results(theme: Theme) -> plt.Figure:
  """Losses of the tiny table beside the cost of each mixer."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.6, 5.0), layout="constrained"
  )
  _losses(left, theme)
  _times(right, theme)
  return figure


def main() -> None:
  """Writes <figure>-<theme>.svg beside this file."""
  for theme in THEMES:
    for draw in (levels, results):
      with plt.rc_context(_style(theme)):
        path = HERE / f"{draw.__name__}-{theme.name}.svg"
        figure = draw(theme)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
      lines = path.read_text("utf-8").splitlines()
      path.write_text("\n".join(x.rstrip() for x in lines) + "\n", "utf-8")
      print(path.name, path.stat().st_size)


if __name__ == "__main__":
  main()
