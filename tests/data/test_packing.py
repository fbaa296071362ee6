"""The packer, against a plain loop and its laws."""

import time

import numpy as np
import pytest

from nl_jax.data import packing, tokenizers

pytestmark = pytest.mark.versions


def _documents(rng: np.random.Generator, count: int, longest: int) -> list:
  """Documents of distinct tokens, so that every pair is recognisable."""
  lengths = rng.integers(1, longest, count)
  edges = np.concatenate([[0], np.cumsum(lengths)]) + 1
  return [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:])]


def _slow_pack(documents, sequence_length, alignment):
  """The definition, one token at a time: rows of (input, target, segment)."""
  stream = []
  for document in documents:
    pairs = list(zip(document[:-1], document[1:]))
    stream += [(a, b, document[0]) for a, b in pairs]
    stream += [(0, 0, 0)] * (-len(pairs) % alignment)
  stream += [(0, 0, 0)] * (-len(stream) % sequence_length)
  rows = []
  for start in range(0, len(stream), sequence_length):
    segments, row = [], []
    for a, b, owner in stream[start : start + sequence_length]:
      if owner and owner not in segments:
        segments.append(owner)
      row.append((a, b, segments.index(owner) + 1 if owner else 0))
    rows.append(row)
  return np.asarray(rows, np.int64).reshape(-1, sequence_length, 3)


_CASES = [
  (0, 30, 20, 16, 1),
  (1, 30, 20, 16, 4),
  (2, 8, 200, 32, 8),
  (3, 50, 3, 8, 8),
  (4, 1, 100, 8, 2),
  (5, 40, 12, 24, 6),
]


@pytest.mark.parametrize("seed, count, longest, length, alignment", _CASES)
def test_rows_equal_the_definition(seed, count, longest, length, alignment):
  documents = _documents(np.random.default_rng(seed), count, longest)
  rows = packing.pack(documents, length, alignment)
  expected = _slow_pack(documents, length, alignment)
  for i, key in enumerate(("inputs", "targets", "segment_ids")):
    assert rows[key].dtype == np.int32
    np.testing.assert_array_equal(rows[key], expected[..., i])
  assert rows["weights"].dtype == np.float32
  np.testing.assert_array_equal(rows["weights"], rows["segment_ids"] > 0)


@pytest.mark.parametrize("seed, count, longest, length, alignment", _CASES)
def test_every_pair_appears_once(seed, count, longest, length, alignment):
  documents = _documents(np.random.default_rng(seed), count, longest)
  rows = packing.pack(documents, length, alignment)
  real = rows["segment_ids"] > 0
  inputs, targets = rows["inputs"][real], rows["targets"][real]
  expected = np.concatenate([d[:-1] for d in documents])
  np.testing.assert_array_equal(inputs, expected)
  # Tokens count upwards in a document: a target of another would not follow.
  np.testing.assert_array_equal(targets, inputs + 1)


@pytest.mark.parametrize("seed, count, longest, length, alignment", _CASES)
def test_segments_start_on_the_grid(seed, count, longest, length, alignment):
  documents = _documents(np.random.default_rng(seed), count, longest)
  segments = packing.pack(documents, length, alignment)["segment_ids"]
  for row in segments:
    ids = [i for i in dict.fromkeys(row.tolist()) if i]
    assert ids == list(range(1, len(ids) + 1))
    for i in ids:
      assert np.flatnonzero(row == i)[0] % alignment == 0
      # A document is one run: its padding is after it, never inside.
      assert np.ptp(np.flatnonzero(row == i)) + 1 == np.sum(row == i)
  # Only the last row may end in more padding than an alignment asks for.
  tails = np.argmax(segments[:-1, ::-1] > 0, axis=1)
  assert (tails < alignment).all()


def test_a_long_document_goes_on_in_the_next_row():
  rows = packing.pack([np.arange(1, 12), np.arange(20, 24)], 8, 2)
  np.testing.assert_array_equal(rows["inputs"][1], [9, 10, 20, 21, 22, 0, 0, 0])
  np.testing.assert_array_equal(
    rows["segment_ids"][1], [1, 1, 2, 2, 2, 0, 0, 0]
  )


def test_documents_without_pairs_leave_no_trace():
  empty, full = np.asarray([1]), np.asarray([5, 6, 1])
  one = packing.pack([empty, full, empty, np.asarray([], int), full], 8, 2)
  two = packing.pack([full, full], 8, 2)
  for key, rows in two.items():
    np.testing.assert_array_equal(one[key], rows)


@pytest.mark.parametrize("documents", [[], [np.asarray([1])]])
def test_nothing_gives_no_rows(documents):
  assert packing.pack(documents, 8)["weights"].shape == (0, 8)


def test_padding_has_the_given_id_and_no_weight():
  rows = packing.pack([np.asarray([5, 6, 7])], 4, pad_id=9)
  np.testing.assert_array_equal(rows["inputs"], [[5, 6, 9, 9]])
  np.testing.assert_array_equal(rows["weights"], [[1, 1, 0, 0]])


def test_tokenize_ends_every_document():
  tokens = packing.tokenize(["ab", "", "c"], tokenizers.Bytes())
  assert [t.tolist() for t in tokens] == [[100, 101, 1], [1], [102, 1]]


def test_time_is_linear_and_fast():
  documents = [np.ones(2000, np.int32)] * 2000
  start = time.process_time()
  packing.pack(documents, 1024, 16)
  # Megabytes of bytes a second: about 50 measured, 2 asked for.
  assert 4.0 / (time.process_time() - start) > 2


@pytest.mark.parametrize(
  "length, alignment, words",
  [
    (250, 16, "data.sequence_length=250 .*=16; nearest: 240 or 256"),
    (8, 16, "nearest: 16"),
    (0, 1, "data.sequence_length must be a whole number"),
    (8, 0, "data.alignment must be a whole number"),
    (8.0, 1, "got 8.0"),
  ],
)
def test_lengths_that_do_not_fit_are_refused(length, alignment, words):
  with pytest.raises(ValueError, match=words):
    packing.pack([np.arange(4)], length, alignment)
