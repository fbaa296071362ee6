"""Mixtures: shares, exact resume, and what is refused."""

import numpy as np
import pytest

from nl_jax import data
from nl_jax.data import dataset, packing
from tests.data import test_documents, test_preparation


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("parts")
  test_documents.write_jsonl(folder / "a.jsonl", ["a" * 40] * 300)
  test_documents.write_parquet(folder / "b.parquet", ["b" * 40] * 120)
  return folder


def load(parts, a=0.75, b=0.25, **changes):
  path = f"jsonl:{parts}/a.jsonl={a},parquet:{parts}/b.parquet={b}"
  values = dict(
    source="mixture", path=path, sequence_length=8, batch_size=4, seed=1
  )
  return data.load(**values | changes)


def share_of_b(mixture, batches):
  drawn = [next(mixture.train) for _ in range(batches)]
  ids = np.concatenate([x["targets"][x["weights"] > 0] for x in drawn])
  ids = ids[ids != 1]
  return float(np.mean(ids == ord("b") + 3))


@pytest.mark.parametrize("a,b,share", [(3, 1, 0.25), (0.1, 0.9, 0.9)])
def test_rows_are_drawn_by_weight(parts, a, b, share):
  assert share_of_b(load(parts, a, b), 200) == pytest.approx(share, abs=0.02)


def test_goes_on_from_one_integer(parts):
  whole, later = load(parts), load(parts)
  batches = [next(whole.train) for _ in range(30)]
  assert whole.train.get_state() == {"next_row": 120}
  later.train.set_state({"next_row": 68})
  for batch in batches[17:]:
    other = next(later.train)
    for key, x in batch.items():
      np.testing.assert_array_equal(other[key], x)


def test_each_part_has_epochs_of_its_own(parts):
  mixture = load(parts, 0.5, 0.5)
  count = packing.count(mixture.rows["train"])
  one = load(parts, 1, 1e-9)  # Nearly the first part alone.
  rows = int(np.sum(mixture.rows["train"]["inputs"][:, 0] == ord("a") + 3))
  drawn = [next(one.train) for _ in range(rows // 4)]
  firsts = np.concatenate([x["inputs"] for x in drawn])
  assert (firsts[:, 0] == ord("a") + 3).all() and rows < count


def test_weights_are_part_of_the_fingerprint(parts):
  prints = {load(parts, *w).fingerprint for w in ((3, 1), (1, 3), (3, 1))}
  assert len(prints) == 2


def test_validation_is_of_all_parts(parts):
  mixture = load(parts)
  ids = np.concatenate([x["inputs"] for x in mixture.validation()])
  assert {ord("a") + 3, ord("b") + 3} <= set(np.unique(ids))
  text = mixture.describe()
  assert "mixture" in text and "jsonl" in text


def test_prepared_parts_mix_with_others(parts, tmp_path):
  test_preparation.prepare(
    tmp_path / "out", parts / "a.jsonl", sequence_length=8, alignment=1
  )
  path = f"prepared:{tmp_path}/out=1,parquet:{parts}/b.parquet=1"
  mixture = load(parts, path=path)
  assert share_of_b(mixture, 100) == pytest.approx(0.5, abs=0.03)
  assert mixture.train.get_state() == {"next_row": 400}


def test_a_part_may_have_fewer_rows_than_a_batch(parts, tmp_path):
  (tmp_path / "small.txt").write_text("c" * 9)
  path = f"jsonl:{parts}/a.jsonl=1,text:{tmp_path}/small.txt=1"
  mixture = load(parts, path=path)
  firsts = [next(mixture.train)["inputs"][:, 0] for _ in range(50)]
  assert np.mean(np.concatenate(firsts) == ord("c") + 3) == 0.5


@pytest.mark.parametrize("path,words", [
  ("", "needs data.path=source:path=weight"),
  ("jsonl:a", "needs data.path=source:path=weight"),
  ("jsonl:a=much", "needs data.path=source:path=weight"),
  ("jsonl:a=0", "weights above 0"),
  ("jsonl:a=-1", "weights above 0"),
  ("jsonll:a=1", "Did you mean 'jsonl'"),
  ("mixture:a=1", "no source in data.path 'mixture'"),
])  # fmt: skip
def test_bad_mixtures(path, words):
  with pytest.raises(ValueError, match=words):
    dataset.parse_mixture(path)
