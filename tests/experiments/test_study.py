"""Studies: trained as commands, continued, printed as a table."""

import json

import numpy as np
import pytest

from experiments.study import streams as streams_lib
from experiments.study import studies, topics
from tests.experiments import forked


def test_a_study_is_trained_told_and_not_trained_again(tmp_path):
  study = ["study", "--name=tiny_table", "--smoke", "--seeds=1", "--jobs=1"]
  trained = "--study=runs/studies/tiny_table/smoke"
  streams = ["study", "--name=streams", *study[2:]]
  first, again, rows, unknown, no_name, pairs, table, *wrong = forked.run([
    study, study, [*study, "--rows=transformer_tiny"],
    [*study, "--rows=nobody"], ["study"], streams, ["tables", trained],
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
  assert pairs.returncode == 0, pairs.stderr
  *_, packed, stream, difference = pairs.stdout.splitlines()
  assert difference.startswith("| deltanet, stream - packed |")
  one, other, less = (
    float(line.split("|")[3]) for line in (packed, stream, difference)
  )
  assert other - one == pytest.approx(less, abs=2e-3) and 4 < one < 6
  for name in ("tiny_table", "streams"):
    picture = tmp_path / "runs" / "studies" / name / "smoke" / "table.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_row_of_a_study_is_a_config(tmp_path):
  for name, study in studies.STUDIES.items():
    rows = study(False, tmp_path).rows
    assert len(rows) > 5, name
  table = studies.tiny_table(False, tmp_path).rows
  assert len(table) == len({config for config, _ in table.values()})


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
  rows = streams_lib.windows(512)
  assert rows.shape == (48, 513)
  for row in rows:
    assert tokenizers.Bytes().decode(row) not in train
  for found in topics.texts(512).values():
    for text in found:
      assert tokenizers.Bytes().decode(text) not in train


def test_streams_read_training_files_alone(tmp_path):
  from nl_jax.data import sources

  path = tmp_path / "new" / "text.jsonl"
  streams_lib.write_text(path, 50_000)
  texts = [json.loads(x)["text"] for x in path.read_text().splitlines()]
  assert set(texts) <= set(sources.embedded().train)
  assert len("".join(texts[:-1])) < 50_000 <= len("".join(texts).encode())
  streams_lib.write_text(path, 60_000)  # What is there is what was read.
  assert len(path.read_text().splitlines()) == len(texts)


def test_buckets_are_means_over_trained_rows():
  got = streams_lib.buckets(np.arange(16.0), 2)
  np.testing.assert_array_equal(got, [0.5, 2.5, 5.5, 11.5])


@pytest.mark.parametrize(
  "values,text", [([1.5], "1.500"), ([1.0, 2.0], "1.500 ± 0.707")]
)
def test_a_cell_is_mean_and_spread(values, text):
  assert studies.cell(values) == text
