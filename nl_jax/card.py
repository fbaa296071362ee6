"""The level card: every component of a model, and how often it changes.

One row a component (docs/mathematics.md 1; camera-ready Fig. 3). A model
gives rows without their place in the order; `rank` gives each its update
frequency and its level, which hang on all rows together, so that the rows of
an optimizer can be added first. Higher level numbers mean lower frequencies.
"""

import dataclasses
import math
from collections.abc import Sequence

from nl_jax.levels import NONPARAMETRIC, STEP, LevelRow


def rank(
  rows: Sequence[LevelRow], batch_tokens: int | None = None
) -> list[LevelRow]:
  """Fills in level and frequency of every row.

  frequency = C_max / C, C_max the largest finite chunk among the rows; ∞ for
  what has no parameters, 0 for what is frozen in deployment, there with the
  frequency of pre-training in brackets.

  Args:
    rows: all rows of the card.
    batch_tokens: the chunk of a `STEP`. Where it is None steps count as the
      longest chunk, unless another row has a finite one: then they are left
      open ("?").
  """
  chunks = [_tokens(row, batch_tokens) for row in rows]
  finite = [c for c in chunks if c]
  longest = max(finite, default=None)
  if longest is None:  # Nothing but steps of unknown length.
    chunks = [1 if row.chunk == STEP else c for row, c in zip(rows, chunks)]
    longest = 1
  values = [
    math.inf if row.chunk == NONPARAMETRIC else longest / c if c else None
    for row, c in zip(rows, chunks)
  ]
  deployed = [0.0 if r.frozen else v for r, v in zip(rows, values)]
  order = sorted({v for v in deployed if v is not None}, reverse=True)
  return [
    dataclasses.replace(
      row,
      level=order.index(now) + 1 if now is not None else len(order) + 1,
      frequency=f"0 ({_ratio(value)})" if row.frozen else _ratio(value),
    )
    for row, value, now in zip(rows, values, deployed)
  ]


def _tokens(row: LevelRow, batch_tokens: int | None) -> int | None:
  """Tokens of the row's chunk; None where it is unknown or has none."""
  if row.chunk == NONPARAMETRIC:
    return None
  return batch_tokens if row.chunk == STEP else row.chunk


def _ratio(value: float | None) -> str:
  if value is None:
    return "?"
  if value == math.inf:
    return "∞"
  return count(int(value)) if value == int(value) else f"{value:.3g}"


def count(tokens: int) -> str:
  """Tokens with binary units: 64, 20K (20 · 2^10), 1M (2^20), 16M."""
  for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
    if tokens >= size and tokens * 10 % size == 0:
      return f"{tokens / size:g}{unit}"
  return str(tokens)


def _amount(value: int, base: int, units: Sequence[str]) -> str:
  """Three digits and a unit: 1.31G; "-" for nothing."""
  if not value:
    return "-"
  power = min(int(math.log(value, base) + 1e-9), len(units) - 1)
  return f"{value / base**power:.3g}{units[power]}"


_HEADER = (
  *("component", "kind", "level", "chunk", "BPTT", "frequency", "objective"),
  *("rule", "transfer", "state/seq", "parameters"),
)
_RIGHT = {"level", "chunk", "BPTT", "frequency", "state/seq", "parameters"}


def _cells(row: LevelRow) -> tuple[str, ...]:
  if row.frozen:
    chunk = "∞"
  elif row.chunk == NONPARAMETRIC:
    chunk = "1"
  else:
    chunk = "batch" if row.chunk == STEP else count(row.chunk)
  return (
    *(row.name, row.kind, str(row.level), chunk),
    "L" if row.bptt is None else count(row.bptt),
    *(row.frequency, row.objective, row.rule, row.transfer),
    _amount(row.state_bytes, 1024, ("B", "KiB", "MiB", "GiB")),
    _amount(row.parameters, 1000, ("", "K", "M", "B")),
  )


def format_rows(
  rows: Sequence[LevelRow], batch_tokens: int | None = None
) -> str:
  """The card as an aligned table, fastest level first.

  Args:
    rows: of `model.levels()`, and those of the optimizer.
    batch_tokens: tokens of an optimizer step, see `rank`.
  """
  ranked = sorted(rank(rows, batch_tokens), key=lambda row: row.level)
  table = [_HEADER, *(_cells(row) for row in ranked)]
  widths = [max(len(line[i]) for line in table) for i in range(len(_HEADER))]
  lines = []
  for line in table:
    cells = (
      text.rjust(width) if name in _RIGHT else text.ljust(width)
      for name, text, width in zip(_HEADER, line, widths)
    )
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
