"""The published tables, against figures of their text."""

from nl_jax.tasks import languages, needles, published


def test_languages():
  rows = {row["model"]: row for row in published.rows(published.LANGUAGES)}
  assert rows["DeltaNet"]["parity0"] == "98.2"
  assert rows["Hope"]["shuffle_21"] == "100"
  columns = set(rows["Hope"]) - {"model", "parallel"}
  names = {column[:-1] for column in columns}
  assert len(columns) == 12 and names <= set(languages.LANGUAGES)


def test_needles():
  assert published.ruler("niah_single_1", 4096)["Hope"] == "100"
  assert published.ruler("niah_multivalue", 16384)["Transformer"] == "21.5"
  assert published.ruler("niah_single_3", 8192)["Titans"] == "42.8"
  assert published.ruler("niah_single_1", 512) == {}
  assert published.ruler("niah_multikey_2", 4096) == {}
  assert set(published.RULER_COLUMNS) <= set(needles.TASKS)
