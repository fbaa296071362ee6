"""The data set that a caller loads: fingerprint, resume, errors, imports."""

import subprocess
import sys

import numpy as np
import pytest

from nl_jax import data
from tests.data import test_tokenizers


def _load(**changes) -> data.Dataset:
  values = dict(source="synthetic", sequence_length=64, batch_size=4)
  return data.load(**(values | changes))


def test_text_comes_back_whole(tmp_path):
  files = {f"{i}.txt": f"Document {i}, ünïcode 😀.\n" * 40 for i in range(12)}
  for name, body in files.items():
    (tmp_path / name).write_text(body, encoding="utf-8")
  loaded = _load(source="text", path=str(tmp_path), alignment=16)
  for split in ("train", "validation"):
    rows = loaded.rows[split]
    targets = rows["targets"][rows["segment_ids"] > 0]
    documents = np.split(targets, np.flatnonzero(targets == 1) + 1)[:-1]
    read = [loaded.tokenizer.decode(d) for d in documents]
    assert read == [d[1:] for d in loaded.source.documents(split)]


@pytest.mark.parametrize("name,source", [
  ("a.txt", "text"), ("a.TXT", "text"), ("a.jsonl.gz", "jsonl"),
  ("a.parquet", "parquet"), ("a.array_record-00000-of-00001", "array_record"),
  ("manifest.json", "prepared"), ("dataset_info.json", "hugging_face"),
])  # fmt: skip
def test_a_path_says_what_it_is(tmp_path, name, source):
  folder = tmp_path / "corpus"
  (folder / "deep").mkdir(parents=True)
  marks = name in ("manifest.json", "dataset_info.json")
  path = folder / name if marks else folder / "deep" / name
  path.write_text("x")
  assert data.infer(str(folder)) == source
  if not marks:
    assert data.infer(str(path)) == source


def test_a_path_that_does_not_say_what_it_is(tmp_path):
  assert data.infer("jsonl:a=0.7,text:b=0.3") == "mixture"
  for name in ("a.txt", "b.jsonl", "c.md"):
    (tmp_path / name).write_text("some words\n" * 99)
  for path, words in (
    ("", "data.source and data.path are empty"),
    (str(tmp_path), "holds files of text, jsonl; set data.source to one of te"),
    (str(tmp_path / "c.md"), "says no data.source; set data.source to one of"),
  ):
    with pytest.raises(ValueError, match=words):
      data.infer(path)
  with pytest.raises(FileNotFoundError, match="nothing at data.path='x.txt'"):
    data.infer("x.txt")
  assert _load(source="", path=str(tmp_path / "a.txt")).source.name == "text"


def test_a_begin_is_learned_from_and_the_first_token_is_a_target(tmp_path):
  (tmp_path / "a.txt").write_text("abc\n" * 200)
  (tmp_path / "b.txt").write_text("cab\n" * 200)
  path = test_tokenizers.letters(tmp_path)
  load = lambda **changes: _load(
    source="text", path=str(tmp_path), tokenizer=path, **changes
  )
  plain, begun = load(), load(bos=True)
  for split in ("train", "validation"):
    counts = [x.counts[split] for x in (plain, begun)]
    assert counts[1].tokens == counts[0].tokens + counts[0].documents
  first = begun.rows["train"]
  assert first["inputs"][0, 0] == 8 and first["targets"][0, 0] == 4
  prints = {x.fingerprint for x in (plain, begun, load(special_tokens="text"))}
  assert len(prints) == 3
  assert "tokenizer.json (special tokens are parsed): train" in (
    plain.describe()
  )
  with pytest.raises(ValueError, match="bad_documents=skip applies to files"):
    _load(bad_documents="skip")


def test_an_epoch_has_every_token_once_across_a_resume():
  one = _load(alignment=16)
  rows = one.rows["train"]
  count = len(rows["inputs"])
  first = [next(one.train) for _ in range(count // 8)]
  two = _load(alignment=16)
  two.train.set_state(one.train.get_state())
  second = [next(two.train) for _ in range(-(-count // 4) - len(first))]
  for key in ("targets", "segment_ids", "weights"):
    # The last batch may begin the next epoch.
    read = np.concatenate([b[key] for b in first + second])[:count]
    read, expected = (sorted(map(bytes, x)) for x in (read, rows[key]))
    assert read == expected
  assert one.counts["train"].tokens == rows["weights"].sum()


def test_counts_are_of_the_text():
  loaded = _load()
  for split, counts in loaded.counts.items():
    documents = loaded.source.documents(split)
    assert counts.documents == len(documents)
    assert counts.bytes == sum(map(len, documents))
    assert counts.tokens == counts.bytes  # One more by the end, one less shift.
    assert counts.rows == len(loaded.rows[split]["inputs"])


def test_validation_is_always_the_same_and_complete():
  loaded = _load()
  one, two = loaded.validation(), loaded.validation()
  next(loaded.train)
  for a, b in zip(one, two):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  weight = sum(b["weights"].sum() for b in one)
  assert weight == loaded.counts["validation"].tokens
  assert len(loaded.validation(2)) == 2


def test_the_fingerprint_is_of_all_that_decides_the_data(tmp_path):
  same = _load().fingerprint
  assert _load().fingerprint == same
  assert _load(batch_size=8, process_count=2).fingerprint == same
  changes = [{"seed": 1}, {"sequence_length": 32}, {"alignment": 8}]
  assert len({same} | {_load(**c).fingerprint for c in changes}) == 4
  path = tmp_path / "a.txt"
  prints = set()
  for body in ("abc\n" * 400, "abd\n" * 400):
    path.write_text(body)
    prints.add(_load(source="text", path=str(path)).fingerprint)
  assert len(prints) == 2


def test_describe_is_one_line():
  line = _load().describe()
  assert "synthetic" in line and "bytes" in line and "\n" not in line


def test_embedded_loads_and_decodes():
  loaded = _load(source="embedded", sequence_length=256, alignment=16)
  assert loaded.counts["train"].tokens > 2e6
  batch = next(loaded.train)
  text = loaded.tokenizer.decode(batch["inputs"][0])
  assert any(text[:50] in document for document in loaded.source.train)


def test_sentencepiece_loads(data_dir):
  path = data_dir / "tokenizers" / "sentencepiece_test_model.model"
  if not path.is_file():
    pytest.skip("no sentencepiece_test_model.model in NL_DATA/tokenizers")
  loaded = _load(tokenizer=str(path), vocab_size=1000)
  batch = next(loaded.train)
  assert batch["inputs"].max() < 1000
  # Id 0 is a real token of this model: only segments say what is padding.
  np.testing.assert_array_equal(batch["weights"] > 0, batch["segment_ids"] > 0)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"source": "sintetic"}, "Did you mean 'synthetic'"),
    ({"tokenizer": "bites"}, "Did you mean 'bytes'"),
    ({"path": "x"}, "data.path='x' is not read"),
    ({"alignment": 48}, "nearest: 48 or 96"),
    ({"vocab_size": 256}, "model.vocab_size=256 is smaller"),
    ({"batch_size": 6, "process_count": 4}, "nearest: 4 or 8"),
    ({"batch_size": 10**6}, "fewer than data.batch_size=1000000; lower"),
    ({"seed": -1}, "data.seed must be a whole number"),
  ],
)
def test_mistakes_are_one_sentence(changes, words):
  with pytest.raises(ValueError, match=words) as caught:
    _load(**changes)
  assert "\n" not in str(caught.value)


def test_import_is_light():
  code = (
    "import sys; from nl_jax import data; from nl_jax.data import packing, "
    "sources, tokenizers; print([m for m in ('grain', 'jax', 'sentencepiece', "
    "'tensorflow') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"
