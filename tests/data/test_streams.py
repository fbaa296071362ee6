"""Streams: the rows of the packer, each after the one that it continues."""

import numpy as np
import pytest

from nl_jax import data
from nl_jax.data import packing, pipeline, streams

END = 9


def documents(lengths):
  """Tokens 1 to 8, then the end."""
  draw = np.random.default_rng(0)
  return [np.append(draw.integers(1, 9, n), END) for n in lengths]


ROWS = packing.pack(documents([5, 30, 3, 8, 2, 17, 4, 9, 21, 6]), 8, 4)
COUNT = len(ROWS["inputs"])


def batches(number, **more):
  made = streams.make(ROWS, **{"batch_size": 4, "end_id": END} | more)
  return [next(made) for _ in range(number)]


def joined(number, **more):
  """What each of four streams reads: {name: [4, rows * T]}."""
  parts = batches(number, **more)
  return {k: np.concatenate([p[k] for p in parts], axis=1) for k in parts[0]}


def test_every_row_is_read_once_an_epoch_and_in_order():
  longest = -(-COUNT // 4)
  read = joined(longest)["inputs"].reshape(4, longest, 8)
  edges = np.arange(5) * COUNT // 4
  for stream, (first, end) in enumerate(zip(edges, edges[1:])):
    np.testing.assert_array_equal(
      read[stream, : end - first], ROWS["inputs"][first:end]
    )
  # A stream with fewer rows has begun again.
  np.testing.assert_array_equal(
    read[0, -1], ROWS["inputs"][(longest - 1) % (edges[1] - edges[0])]
  )


def numbered(ids):
  """Documents of a stream by the rule of `streams.make`, from local ids."""
  number, out = 1, []
  for row in ids:
    out.append(np.where(row > 0, number + row - 1, 0))
    number = max(number, out[-1].max())
  return np.stack(out)


def test_documents_go_on_where_the_packer_cut_them():
  # One stream of all rows: documents as the packer was given them.
  made = streams.make(ROWS, batch_size=1, end_id=END)
  parts = [next(made) for _ in range(2 * COUNT)]
  ids = numbered(np.concatenate([p["segment_ids"] for p in parts]))
  targets = np.concatenate([p["targets"] for p in parts])
  real = ids > 0
  found = [targets[(ids == i) & real] for i in np.unique(ids[real])]
  expected = [d[1:] for d in documents([5, 30, 3, 8, 2, 17, 4, 9, 21, 6])]
  assert len(found) == 20
  for got, wanted in zip(found, expected * 2):
    np.testing.assert_array_equal(got, wanted)


def test_a_stream_begins_a_document_where_its_rows_begin():
  first = batches(1)[0]["segment_ids"]
  assert (first[:, 0] == 2).all()


def test_without_resets_all_is_one_document():
  ids = np.concatenate([b["segment_ids"] for b in batches(9, reset="never")])
  assert set(np.unique(ids)) == {0, 1}
  assert (ids > 0).sum() == sum(
    (b["segment_ids"] > 0).sum() for b in batches(9)
  )


def test_rows_of_a_stream_may_lie_side_by_side():
  one = joined(6)
  two = batches(3, batch_size=8, consecutive=2)
  for name in ("inputs", "targets", "weights"):
    stacked = np.concatenate([b[name].reshape(4, 16) for b in two], axis=1)
    np.testing.assert_array_equal(one[name], stacked)


def test_the_place_is_kept():
  made = streams.make(ROWS, batch_size=4, end_id=END)
  for _ in range(3):
    next(made)
  state = made.get_state()
  assert state == {"next_row": 12}
  again = streams.make(ROWS, batch_size=4, end_id=END)
  again.set_state(state)
  one, other = next(made), next(again)
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name])
  with pytest.raises(ValueError, match="not a whole number of batches of 4"):
    again.set_state({"next_row": 13})


def test_processes_draw_parts_of_the_same_batches():
  whole = batches(3, batch_size=8, consecutive=2)
  halves = [
    batches(3, batch_size=8, consecutive=2, process_index=i, process_count=2)
    for i in range(2)
  ]
  for one, parts in zip(whole, zip(*halves)):
    for name in one:
      np.testing.assert_array_equal(
        one[name], np.concatenate([p[name] for p in parts])
      )


def test_parts_of_a_mixture_have_streams_by_weight():
  mix = pipeline.Mix((6, COUNT - 6), (3.0, 1.0))
  first = batches(1, mix=mix)[0]["inputs"]
  np.testing.assert_array_equal(first, ROWS["inputs"][[0, 2, 4, 6]])


@pytest.mark.parametrize("change,message", [
  (dict(batch_size=2, mix=pipeline.Mix((1, 1, 1), (1, 1, 1))),
   "has 2 streams for the 3 parts"),
  (dict(batch_size=64), "rows, fewer than its 64 streams"),
  (dict(batch_size=6, consecutive=4), "data.batch_size must be a multiple of"),
  (dict(batch_size=6, process_count=4), "the number of streams must be"),
  (dict(consecutive=0), "train.carry_gradient must be at least 1"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    streams.make(ROWS, **{"batch_size": 4, "end_id": END} | change)


def loaded(**more):
  return data.load(
    **{"source": "synthetic", "sequence_length": 32, "batch_size": 4}
    | {"alignment": 8, "rows": "stream"}
    | more
  )


def test_packed_rows_and_streams_hold_the_same_tokens():
  packed, stream = loaded(rows="packed"), loaded()
  for name, x in packed.rows["train"].items():
    np.testing.assert_array_equal(x, stream.rows["train"][name])
  assert packed.fingerprint != stream.fingerprint
  assert stream.fingerprint != loaded(batch_size=8).fingerprint


def test_streams_without_resets_have_no_padding():
  rows = loaded(reset="never").rows
  assert (rows["train"]["segment_ids"] > 0).all()
  # Held out text is read row by row, from an empty memory.
  np.testing.assert_array_equal(
    rows["validation"]["inputs"], loaded().rows["validation"]["inputs"]
  )


@pytest.mark.parametrize("change,message", [
  (dict(rows="streams"), "must be one of packed, stream; got 'streams'"),
  (dict(reset="always"), "must be one of document, never; got 'always'"),
])  # fmt: skip
def test_unknown_names_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    loaded(**change)
