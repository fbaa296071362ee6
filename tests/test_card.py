"""The level card reproduces camera-ready Fig. 3 (docs/mathematics.md 1)."""

import pytest

from experiments.cli import named
from nl_jax import build, card
from nl_jax.levels import LevelRow


def ranked(name):
  config = build.resolve(named.load_config(name))
  net = build.model(config)
  rows = card.rank(net.levels()[0], build.tokens_per_step(config))
  return {row.name: row for row in rows}, config


def printed(row):
  _, _, _, chunk, bptt, frequency, *_ = card._cells(row)
  return chunk, bptt, frequency


def test_hope_is_figure_3():
  rows, _ = ranked("hope_1b3:paper")
  assert printed(rows["projections k, v, eta, alpha"]) == ("16", "L", "1M")
  assert printed(rows["self-modifying Titans"]) == ("16", "L", "1M")
  assert printed(rows["high FFN"])[::2] == ("1M", "16")
  assert printed(rows["mid FFN"])[::2] == ("4M", "4")
  assert printed(rows["low FFN"]) == ("16M", "1", "1")


def test_default_hope_has_chunks_of_64():
  rows, _ = ranked("hope_1b3")
  assert printed(rows["self-modifying Titans"]) == ("64", "L", "256K")


def test_transformer_is_figure_3():
  rows, _ = ranked("transformer_1b3")
  slow = rows["slow weights (projections and FFN)"]
  assert printed(slow) == ("∞", "1", "0 (1)")
  assert printed(rows["attention"]) == ("1", "1", "∞")


@pytest.mark.parametrize(
  "name", ["hope_1b3", "hope_linear_340m", "hope_attention_tiny"]
)
def test_every_parameter_stands_on_one_row(name):
  rows, config = ranked(name)
  total = sum(row.parameters for row in rows.values())
  assert total == build.model(config).parameter_count()


def test_the_card_is_sorted_by_level_and_says_what_is_frozen():
  rows, config = ranked("hope_tiny")
  text = card.format_rows(list(rows.values()), 2048).splitlines()
  assert text[0].split()[0] == "component" and len(text) == len(rows) + 1
  levels = [row.level for row in sorted(rows.values(), key=lambda r: r.level)]
  assert levels[0] == 1 and levels == sorted(levels)
  with pytest.raises(ValueError, match="kind must be one of"):
    LevelRow(name="x", kind="y", chunk=1)
