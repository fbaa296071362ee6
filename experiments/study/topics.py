"""What a model that has read package A, and then B, still knows of A.

Texts are held-out files of the embedded corpus. Three readings end with the
same second text of A: alone; after the first text of A; after the first text
of A and one of B. All levels start from the trained weights, and learn as they
read.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.study import studies

_PAIRS = 12
_READINGS = ("A2", "A1 A2", "A1 B A2")
_PARTS = 8  # Of A2 in the picture.


def texts(length: int) -> dict[str, list[np.ndarray]]:
  """By package: two held-out texts of `length` bytes, as tokens."""
  from nl_jax.data import sources, tokenizers

  held = set(sources.embedded().validation)
  found: dict[str, str] = {}
  for package in sources.EMBEDDED_PACKAGES:
    own = sources.embedded(packages=(package,))
    both = (*own.train, *own.validation)
    found[package] = "".join(text for text in both if text in held)
  encode = tokenizers.Bytes().encode
  cut = lambda text: np.asarray(encode(text), np.int32)
  return {
    package: [cut(text)[i * length : (i + 1) * length] for i in range(2)]
    for package, text in found.items()
    if len(text.encode()) >= 2 * length
  }


def readings(length: int) -> dict[str, np.ndarray]:
  """By reading: tokens [pairs, its texts * length]."""
  found = texts(length)
  pairs = list(itertools.permutations(sorted(found), 2))
  order = np.random.default_rng(0).permutation(len(pairs))[:_PAIRS]
  rows: dict[str, list[np.ndarray]] = {name: [] for name in _READINGS}
  for a, b in (pairs[i] for i in order):
    named = {"A1": found[a][0], "A2": found[a][1], "B": found[b][0]}
    for name in _READINGS:
      parts = [named[x] for x in name.split()]
      rows[name].append(np.concatenate(parts))
  return {name: np.stack(x) for name, x in rows.items()}


def measure(folder: pathlib.Path, length: int) -> dict[str, np.ndarray]:
  """By reading: nats of the tokens of A2, but its first, [pairs, length-1]."""
  from nl_jax import build, stream
  from nl_jax.train import checkpoint

  _, net = build.of_run(str(folder))
  params, _ = checkpoint.load_params(str(folder), net)
  made = {}
  for name, tokens in readings(length).items():
    reader = stream.start(net, params, batch_size=len(tokens))
    made[name] = reader.score(tokens)[:, -length + 1 :]
  return made


def tell(runs: Sequence[Any], folder: pathlib.Path, length: int) -> str:
  """The table of mean nats of A2 by reading, and the picture over A2.

  Args:
    runs: finished.
    folder: of the picture.
    length: tokens of a text.
  """
  from nl_jax.report import charts

  names = "nat per byte of A2 alone", "after A1", "after A1 and B"
  lines = [
    f"| levels | {' | '.join(names)} | gained by A1 | kept after B | seeds |",
    "|---|---|---|---|---|---|---|",
  ]
  panels = [
    charts.Panel(f"A2 read as {name}: nat per byte", "bytes of A2", [])
    for name in _READINGS
  ]
  for number, (row, group) in enumerate(studies.by_row(runs).items()):
    seeds = [measure(run.folder, length) for run in group]
    means = {x: [float(m[x].mean()) for m in seeds] for x in _READINGS}
    alone, after, switched = (np.array(means[x]) for x in _READINGS)
    cells = [studies.cell(means[x]) for x in _READINGS]
    cells += [studies.cell(list(x)) for x in (alone - after, alone - switched)]
    lines.append(f"| {row} | {' | '.join(cells)} | {len(group)} |")
    for panel, name in zip(panels, _READINGS):
      nats = np.mean([m[name].mean(axis=0) for m in seeds], axis=0)
      parts = np.array_split(nats, _PARTS)
      places = [(i + 0.5) * length / _PARTS for i in range(_PARTS)]
      means_of = [float(x.mean()) for x in parts]
      panel.curves.append(charts.Curve(row, places, means_of, number))
  charts.png(panels, "Package A, then B, then A", folder / "table.png")
  return "\n".join(lines)
