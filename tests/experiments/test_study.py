"""Studies: trained as commands, continued, printed as a table."""

import numpy as np
import pytest

from experiments.study import studies, topics
from tests.experiments import forked


def test_a_study_is_trained_told_and_not_trained_again(tmp_path):
  study = ["study", "--name=tiny_table", "--smoke", "--seeds=1", "--jobs=1"]
  trained = "--study=runs/studies/tiny_table/smoke"
  first, again, rows, unknown, no_name, table, *wrong = forked.run([
    study, study, [*study, "--rows=transformer_tiny"],
    [*study, "--rows=nobody"], ["study"], ["tables", trained],
    ["tables", trained, "--plot=x.png"], ["tables", "--study=runs/studies"],
    ["tables", "--study=topics"],
  ], tmp_path)  # fmt: skip
  assert first.returncode == again.returncode == 0, first.stderr
  assert "2 runs, 0 of them done" in first.stderr
  assert "2 runs, 2 of them done" in again.stderr
  assert first.stdout == again.stdout
  lines = first.stdout.splitlines()
  assert len(lines) == 4 and "`deltanet_tiny`" in first.stdout
  assert sum("(grows)" in line for line in lines) == 1
  assert first.stdout == rows.stdout == table.stdout
  alone, not_one, empty = (x.stderr for x in wrong)
  assert "--study stands alone" in alone
  assert "runs/studies is not the folder of a study" in not_one
  assert "no run in topics was trained to its end" in empty
  assert "unknown row 'nobody'" in unknown.stderr
  assert "--name is required" in no_name.stderr
  folder = tmp_path / "runs" / "studies" / "tiny_table" / "smoke"
  assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_of_a_study_is_a_config():
  for name, study in studies.STUDIES.items():
    rows = study(False).rows
    assert len(rows) > 5, name
  assert len(studies.tiny_table(False).rows) == len(
    {config for config, _ in studies.tiny_table(False).rows.values()}
  )


def test_readings_end_with_the_same_text():
  made = topics.readings(64)
  short, longer, switched = (made[name] for name in ("A2", "A1 A2", "A1 B A2"))
  assert short.shape == (12, 64) and switched.shape == (12, 192)
  np.testing.assert_array_equal(short, longer[:, 64:])
  np.testing.assert_array_equal(short, switched[:, 128:])
  np.testing.assert_array_equal(longer[:, :64], switched[:, :64])
  assert not (switched[:, 64:128] == switched[:, :64]).all(axis=1).any()


def test_texts_are_held_out():
  from nl_jax.data import sources, tokenizers

  train = "\n".join(sources.embedded().train)
  for found in topics.texts(512).values():
    for text in found:
      assert tokenizers.Bytes().decode(text) not in train


@pytest.mark.parametrize(
  "values,text", [([1.5], "1.500"), ([1.0, 2.0], "1.500 ± 0.707")]
)
def test_a_cell_is_mean_and_spread(values, text):
  assert studies.cell(values) == text
