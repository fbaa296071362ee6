"""The published tables that our figures stand beside, as they are printed.

Both are of the long version of Nested Learning (arXiv 2512.24695): Table 1,
needles, of models trained on some 50B tokens; Table 5, formal languages.
"""

import csv
import importlib.resources

RULER, LANGUAGES = "ruler", "languages"
# Columns of Table 1 by our names of the tasks; they end in _4K, _8K, _16K.
RULER_COLUMNS = {
  "niah_single_1": "S1",
  "niah_single_2": "S2",
  "niah_single_3": "S3",
  "niah_multikey_1": "MK1",
  "niah_multiquery": "MQ",
  "niah_multivalue": "MV",
}
RULER_LENGTHS = {4096: "4K", 8192: "8K", 16384: "16K"}


def rows(table: str) -> list[dict[str, str]]:
  """The rows of a table, cells as printed.

  Args:
    table: RULER or LANGUAGES; columns of a language end in 0 or 1, its bin.
  """
  file = importlib.resources.files("nl_jax.tasks") / f"{table}.csv"
  with file.open(encoding="utf-8") as text:
    return list(csv.DictReader(text))


def ruler(task: str, length: int) -> dict[str, str]:
  """Published scores at a length by model; {} where there are none."""
  column, size = RULER_COLUMNS.get(task), RULER_LENGTHS.get(length)
  if column is None or size is None:
    return {}
  return {row["model"]: row[f"{column}_{size}"] for row in rows(RULER)}
