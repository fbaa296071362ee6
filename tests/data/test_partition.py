"""How a corpus is cut: every byte once, at edges, by the files alone."""

import numpy as np
import pytest

from nl_jax.data import documents, partition
from tests.data import test_documents


def settings_of(path, kind="text", **changes):
  values = dict(
    kind=kind, path=str(path), tokenizer="bytes", sequence_length=32,
    alignment=1, shard_bytes=500, document_bytes=200,
  )  # fmt: skip
  return partition.Settings(**values | changes)


def texts_of(settings):
  """The documents of each split, in order."""
  found = {"train": [], "validation": []}
  for pieces in partition.plan(settings):
    for piece in pieces:
      for document, split in partition.read(piece, settings):
        found[split].append(document.text)
  return found


def lines(count, longest, seed=0):
  rng = np.random.default_rng(seed)
  alphabet = list("abcdefghij éü日😀")
  words = lambda: "".join(rng.choice(alphabet, rng.integers(0, longest)))
  return "".join(words() + "\n" for _ in range(count))


@pytest.mark.parametrize("body", [
  lines(100, 30), lines(3, 3000), "a" * 3000, "é" * 1500, "日" * 999 + "\n",
  "\n" * 900, "x",
])  # fmt: skip
@pytest.mark.parametrize("percent", [1.0, 10.0, 60.0])
def test_text_is_cut_and_nothing_lost(tmp_path, body, percent):
  path = tmp_path / "a.txt"
  path.write_bytes(body.encode())
  settings = settings_of(path, validation_percent=percent)
  found = texts_of(settings)
  assert "".join(found["train"] + found["validation"]) == body
  longest = 2 * settings.document_bytes + 4
  whole = found["train"] + found["validation"]
  assert all(len(text.encode()) <= longest for text in whole)
  held_out, size = len("".join(found["validation"])), len(body)
  if size > 1:
    assert held_out / size == pytest.approx(percent / 100, abs=0.2)


def test_text_is_cut_at_line_edges_where_there_are_any(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text(lines(200, 30))
  found = texts_of(settings_of(path))
  whole = found["train"] + found["validation"]
  assert len(whole) > 10 and all(text.endswith("\n") for text in whole)


def test_a_share_is_held_out_of_many_documents(tmp_path):
  path = test_documents.write_jsonl(
    tmp_path / "a.jsonl", [f"document {i}" for i in range(2000)]
  )
  for percent in (0.5, 5.0, 25.0):
    found = texts_of(settings_of(path, "jsonl", validation_percent=percent))
    assert len(found["train"] + found["validation"]) == 2000
    assert len(found["validation"]) / 20 == pytest.approx(percent, abs=1.5)


@pytest.mark.parametrize("kind,name", [
  ("jsonl", "a.jsonl"), ("jsonl", "a.jsonl.gz"), ("parquet", "a.parquet"),
])  # fmt: skip
def test_empty_documents_leave_no_trace(tmp_path, kind, name):
  write = test_documents.write_parquet
  write = test_documents.write_jsonl if kind == "jsonl" else write
  write(tmp_path / name, ["one", "", "two", ""] * 9)
  found = texts_of(settings_of(tmp_path, kind))
  whole = found["train"] + found["validation"]
  assert sorted(whole) == ["one"] * 9 + ["two"] * 9


def test_a_tokenizer_learns_from_what_is_not_held_out(tmp_path):
  path = test_documents.write_jsonl(
    tmp_path / "a.jsonl", [f"document {i}" for i in range(300)]
  )
  settings = settings_of(path, "jsonl", validation_percent=30.0)
  found = texts_of(settings)
  assert found["validation"]
  assert list(partition.training_texts(settings)) == found["train"]


def test_nothing_to_read_is_told(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("")
  with pytest.raises(ValueError, match="is empty; give files with text"):
    partition.plan(settings_of(path))


def test_shards_do_not_depend_on_where_the_corpus_lies(tmp_path):
  plans = []
  for name in ("one", "two"):
    folder = tmp_path / name
    folder.mkdir()
    for i in range(12):
      (folder / f"{i}.txt").write_text(lines(9, 30, i))
    plans.append(partition.plan(settings_of(folder)))
  assert plans[0] == plans[1] and len(plans[0]) > 2
  assert documents.root(str(tmp_path / "one")) == tmp_path / "one"
