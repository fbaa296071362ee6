"""Table 1: its columns, the published rows, and the row of a result.

A cell that was not measured is empty. What keeps a cell from being compared
with the published one is marked, and suppresses the average.
"""

import csv
import importlib.resources
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Column(NamedTuple):
  """A column of Table 1.

  Attributes:
    key: in `table1.csv`.
    title: as printed.
    task, metric: where its number is in a result.
    scale: 100 for accuracies, which are printed in percent.
  """

  key: str
  title: str
  task: str
  metric: str
  scale: float = 100.0


COLUMNS = (
  Column("wiki_ppl", "Wiki ppl ↓", "wikitext", "word_perplexity", 1.0),
  Column("lmb_ppl", "LMB ppl ↓", "lambada_openai", "perplexity", 1.0),
  Column("lmb_acc", "LMB acc", "lambada_openai", "acc"),
  Column("piqa_acc", "PIQA acc", "piqa", "acc"),
  Column("hellaswag_acc_n", "HellaSwag acc_n", "hellaswag", "acc_norm"),
  Column("winogrande_acc", "WinoGrande acc", "winogrande", "acc"),
  Column("arc_e_acc", "ARC-e acc", "arc_easy", "acc"),
  Column("arc_c_acc_n", "ARC-c acc_n", "arc_challenge", "acc_norm"),
  Column("siqa_acc", "SIQA acc", "social_iqa", "acc"),
  Column("boolq_acc", "BoolQ acc", "boolq", "acc"),
)
AVERAGED = tuple(c.key for c in COLUMNS if c.scale == 100.0)  # Eight.
AVERAGE = "avg"
APPROXIMATE, LIMITED, MEMORISED = "†", "‡", "§"
MARKS = {
  APPROXIMATE: "approximate data",
  LIMITED: "not all documents",
  MEMORISED: "levels that learn from the task loss learned the prompt",
}
SOURCES = {
  "neurips": "neurips_camera_ready",
  "arxiv": "arxiv_2512.24695v1",
}
# Baselines of 340M and 15B tokens, which the paper does not print.
_TITANS = "titans_arxiv_2501.00663"
_FILES = ("table1.csv", "table1_titans.csv")
# The paper's names of our archs, of either version. Its "Titans" are the LMM,
# with the same numbers: of the variants with attention no row is printed.
_MODELS = {
  "hope": ("HOPE (ours)", "Hope"),
  "transformer": ("Transformer++",),
  "retnet": ("RetNet",),
  "deltanet": ("DeltaNet",),
  "ttt_linear": ("TTT",),
  "ttt_mlp": ("TTT",),
  "titans_lmm": ("Titans (LMM)", "Titans"),
  "samba": ("Samba*",),
  "rwkv7": ("RWKV-7",),
  "comba": ("Comba",),
  "dla": ("DLA",),
  "memora": ("Miras (Memora)",),
}
_SIZES = {"340M": 340e6, "760M": 760e6, "1.3B": 1.3e9}


class Cell(NamedTuple):
  """A number of a row, in the table's unit, and its marks."""

  value: float
  stderr: float | None
  marks: str = ""


class Published(NamedTuple):
  """A row that was printed.

  Attributes:
    source: where.
    params, tokens: as in the file.
    model: its name there.
    values: by column, and the average, of the eight accuracies.
  """

  source: str
  params: str
  tokens: str
  model: str
  values: dict[str, float]

  @property
  def size(self) -> str:
    """340M, 760M or 1.3B."""
    return self.params.partition("(")[0]


def published() -> list[Published]:
  """All printed rows: both versions of the paper, and Titans' Table 1."""
  rows = []
  folder = importlib.resources.files("nl_jax.eval")
  for name in _FILES:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    for row in csv.DictReader(lines):
      values = {c.key: float(row[c.key]) for c in COLUMNS}
      values[AVERAGE] = float(row["avg_recomputed_8acc"])
      rows.append(
        Published(
          row["source"], row["params"], row["tokens"], row["model"], values
        )
      )
  return rows


def reference(
  arch: str, parameters: int, version: str
) -> tuple[Published | None, list[Published]]:
  """The printed row to compare a model with, and the others of its size.

  Args:
    arch: of the model.
    parameters: their number; the nearest printed size is taken.
    version: a key of `SOURCES`; "none" gives no row.

  Raises:
    ValueError: another version.
  """
  if version == "none":
    return None, []
  if version not in SOURCES:
    raise ValueError(
      f"reference must be one of {', '.join(SOURCES)}, none; got {version!r}"
    )
  rows = [r for r in published() if r.source in (SOURCES[version], _TITANS)]
  own = [r for r in rows if r.model in _MODELS.get(arch, ())]
  distance = lambda size: abs(math.log(_SIZES[size] / parameters))
  sizes = {r.size for r in own} or {*_SIZES}
  size = min(sizes, key=distance)
  # The paper before others.
  own = sorted((r for r in own if r.size == size), key=_is_titans)
  row = own[0] if own else None
  return row, [r for r in rows if r.size == size and r != row]


def _is_titans(row: Published) -> bool:
  return row.source == _TITANS


def cells(result: Mapping[str, Any]) -> dict[str, Cell]:
  """What a result has of the table: cells by column, and the average.

  Args:
    result: a result file, or its `tasks` and `protocol`.
  """
  found = {}
  memorised = result["protocol"]["memorise"] != "none"
  for column in COLUMNS:
    task = result["tasks"].get(column.task, {})
    metric = task.get("metrics", {}).get(column.metric)
    if metric is None or metric["value"] is None:
      continue
    error = metric["stderr"]
    marks = APPROXIMATE if task["fidelity"] == "approximate" else ""
    if task["n_docs"] != task["n_docs_expected"]:
      marks += LIMITED
    found[column.key] = Cell(
      metric["value"] * column.scale,
      None if error is None else error * column.scale,
      marks + (MEMORISED if memorised else ""),
    )
  average = _average(found)
  return found | ({AVERAGE: average} if average else {})


def _average(found: Mapping[str, Cell]) -> Cell | None:
  """Of the eight accuracies; None unless all were measured completely."""
  kept = [found[key] for key in AVERAGED if key in found]
  if len(kept) < len(AVERAGED):
    return None
  if any(mark in c.marks for c in kept for mark in (APPROXIMATE, LIMITED)):
    return None
  known = [c.stderr for c in kept if c.stderr is not None]
  complete = len(known) == len(kept)
  return Cell(
    sum(c.value for c in kept) / len(kept),
    math.sqrt(sum(e * e for e in known)) / len(kept) if complete else None,
    kept[0].marks,
  )


def row(result: Mapping[str, Any]) -> dict[str, Any]:
  """The `table_row` of a result file: numbers in the table's units."""
  found = cells(result)
  shown = lambda key: round(found[key].value, 2) if key in found else None
  partly = {APPROXIMATE, LIMITED} & set(
    "".join(c.marks for c in found.values())
  )
  return {
    **{c.key: shown(c.key) for c in COLUMNS},
    AVERAGE: shown(AVERAGE),
    "marks": {key: cell.marks for key, cell in found.items() if cell.marks},
    "complete": len(found) == len(COLUMNS) + 1 and not partly,
  }


def differences(
  found: Mapping[str, Cell], other: Published
) -> dict[str, float]:
  """Ours minus the printed one, where both are."""
  return {key: cell.value - other.values[key] for key, cell in found.items()}
