"""The pipeline: order, resume to the batch, slices of processes, evaluation."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain import checkpoint as grain_checkpoint

from nl_jax.data import packing, pipeline, sources, tokenizers

pytestmark = pytest.mark.versions


def _rows(count: int, length: int = 4) -> packing.Rows:
  """Row i holds the numbers [i * length + 1, (i + 1) * length]."""
  inputs = np.arange(1, count * length + 1, dtype=np.int32)
  inputs = inputs.reshape(count, length)
  ones = np.ones_like(inputs)
  weights = ones.astype(np.float32)
  return {
    "inputs": inputs,
    "targets": inputs + 1,
    "weights": weights,
    "segment_ids": ones,
  }


def _draw(iterator, count: int) -> list[pipeline.Batch]:
  return [next(iterator) for _ in range(count)]


def _assert_equal(one: list[pipeline.Batch], two: list[pipeline.Batch]):
  assert len(one) == len(two)
  for a, b in zip(one, two):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def test_every_row_once_an_epoch_in_a_new_order():
  rows = _rows(23)
  batches = _draw(pipeline.batches(rows, batch_size=5, seed=0), 23)
  drawn = np.concatenate([b["inputs"][:, 0] for b in batches])
  epochs = drawn.reshape(5, 23)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), rows["inputs"][:, 0])
  assert len({tuple(e) for e in epochs}) == 5


@pytest.mark.parametrize("mix", [
  pipeline.Mix((9,)), pipeline.Mix((4, 5), (1.0, 3.0)),
  pipeline.Mix((4, 5), (1e-9, 1e9)),
])  # fmt: skip
def test_batches_of_one_row_are_those_of_many(mix):
  one = _draw(pipeline.batches(_rows(9), batch_size=1, seed=0, mix=mix), 12)
  four = _draw(pipeline.batches(_rows(9), batch_size=4, seed=0, mix=mix), 3)
  rows = np.concatenate([b["inputs"] for b in one])
  np.testing.assert_array_equal(
    rows, np.concatenate([b["inputs"] for b in four])
  )


def test_rows_stay_together():
  batch = next(pipeline.batches(_rows(9), batch_size=4, seed=1))
  np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
  assert {k: v.dtype.name for k, v in batch.items()} == {
    "inputs": "int32",
    "targets": "int32",
    "weights": "float32",
    "segment_ids": "int32",
  }


def test_the_seed_makes_the_order():
  rows = _rows(50)
  one, two, other = (
    _draw(pipeline.batches(rows, batch_size=8, seed=s), 9) for s in (3, 3, 4)
  )
  _assert_equal(one, two)
  assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(one, other))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 11])
def test_resume_is_exact_at_any_batch(stop):
  rows = _rows(13)
  whole = _draw(pipeline.batches(rows, batch_size=4, seed=2), 12)
  first = pipeline.batches(rows, batch_size=4, seed=2)
  before = _draw(first, stop)
  state = json.loads(json.dumps(first.get_state()))
  second = pipeline.batches(rows, batch_size=4, seed=2)
  second.set_state(state)
  after = _draw(second, 12 - stop)
  _assert_equal(before + after, whole)
  # Three epochs less two rows of the fourth: every token as often as it must.
  tokens = np.concatenate([b["inputs"].ravel() for b in before + after])
  counts = np.bincount(tokens, minlength=13 * 4 + 1)[1:]
  assert counts.sum() == 12 * 4 * 4 and set(counts) <= {3, 4}


def test_the_state_is_one_integer_and_seeks_at_once():
  iterator = pipeline.batches(_rows(13), batch_size=4, seed=2)
  assert iterator.get_state() == {"next_row": 0}
  _draw(iterator, 3)
  assert iterator.get_state() == {"next_row": 12}
  iterator.set_state({"next_row": 10**12})
  assert next(iterator)["inputs"].shape == (4, 4)
  assert iterator.get_state() == {"next_row": 10**12 + 4}


@pytest.mark.parametrize("sizes", [(4, 6, 5), (5, 2, 4), (6, 12, 1)])
def test_another_batch_size_reads_each_row_once(sizes):
  whole = _draw(pipeline.batches(_rows(13), batch_size=1, seed=2), 40)
  place, read = {"next_row": 0}, []
  for size in sizes:
    iterator = pipeline.batches(_rows(13), batch_size=size, seed=2)
    iterator.set_state(place)
    read += _draw(iterator, 2)
    place = iterator.get_state()
  assert place == {"next_row": 2 * sum(sizes)}
  rows = np.concatenate([batch["inputs"] for batch in read])
  wanted = np.concatenate([batch["inputs"] for batch in whole])
  np.testing.assert_array_equal(rows, wanted[: len(rows)])


def test_orbax_saves_and_restores_the_iterator(tmp_path):
  one = pipeline.batches(_rows(13), batch_size=4, seed=2)
  _draw(one, 5)
  two = pipeline.batches(_rows(13), batch_size=4, seed=2)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(5, args=grain_checkpoint.CheckpointSave(one))
    manager.wait_until_finished()
    manager.restore(5, args=grain_checkpoint.CheckpointRestore(two))
  assert two.get_state() == {"next_row": 20}
  _assert_equal(_draw(two, 4), _draw(one, 4))


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_slices_of_processes_make_the_global_batch(processes):
  rows = _rows(20)
  whole = _draw(pipeline.batches(rows, batch_size=6, seed=5), 10)
  parts = [
    _draw(
      pipeline.batches(
        rows, batch_size=6, seed=5, process_index=i, process_count=processes
      ),
      10,
    )
    for i in range(processes)
  ]
  joined = [
    {key: np.concatenate([p[key] for p in step]) for key in step[0]}
    for step in zip(*parts)
  ]
  _assert_equal(joined, whole)


def test_a_run_goes_on_with_another_number_of_processes():
  rows = _rows(20)
  whole = _draw(pipeline.batches(rows, batch_size=6, seed=5), 8)
  half = pipeline.batches(
    rows, batch_size=6, seed=5, process_index=1, process_count=2
  )
  _draw(half, 5)
  one = pipeline.batches(rows, batch_size=6, seed=5)
  one.set_state(half.get_state())
  _assert_equal(_draw(one, 3), whole[5:])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_evaluation_reads_every_row_once_in_order(count, processes):
  rows = _rows(count)
  parts = [
    pipeline.eval_batches(
      rows, batch_size=4, process_index=i, process_count=processes
    )
    for i in range(processes)
  ]
  assert {len(p) for p in parts} == {-(-count // 4)}
  read = [np.concatenate([p["inputs"] for p in step]) for step in zip(*parts)]
  read = np.concatenate(read)
  assert len(read) % 4 == 0
  np.testing.assert_array_equal(read[:count], rows["inputs"])
  assert not read[count:].any()
  weight = sum(b["weights"].sum() for p in parts for b in p)
  assert weight == count * 4


def test_a_limited_evaluation_spreads_over_all_rows():
  batches = pipeline.eval_batches(_rows(100), batch_size=5, limit=2)
  first = np.concatenate([b["inputs"][:, 0] for b in batches])
  np.testing.assert_array_equal(first, np.arange(0, 100, 10) * 4 + 1)
  every = pipeline.eval_batches(_rows(9), batch_size=5, limit=2)
  _assert_equal(every, pipeline.eval_batches(_rows(9), batch_size=5))


def test_evaluation_batches_do_not_share_memory_with_the_rows():
  rows = _rows(4)
  pipeline.eval_batches(rows, batch_size=4)[0]["inputs"][:] = 0
  assert rows["inputs"].all()


def test_make_packs_a_split():
  source = sources.synthetic(0, 64)
  kwargs = dict(sequence_length=64, batch_size=4, alignment=8, seed=0)
  batch = next(pipeline.make(source, tokenizers.Bytes(), **kwargs))
  assert batch["inputs"].shape == (4, 64)
  held_out = pipeline.make(
    source, tokenizers.Bytes(), split="validation", **kwargs
  )
  text = "".join(source.validation)
  row = next(held_out)["inputs"][0]
  assert tokenizers.Bytes().decode(row[:8]) in text


@pytest.mark.parametrize(
  "count, batch_size, seed, index, processes, words",
  [
    (9, 6, 0, 0, 4, "data.batch_size=6 .*processes=4; nearest: 4 or 8"),
    (9, 2, 0, 0, 4, "nearest: 4"),
    (9, 0, 0, 0, 1, "data.batch_size must be a whole number"),
    (9, 4, 0, 4, 4, r"process_index must be in \[0, 4\), got 4"),
    (9, 4, -1, 0, 1, "data.seed must be in"),
    (9, 4, 2**32, 0, 1, "data.seed must be in"),
  ],
)
def test_values_that_do_not_fit_are_refused(
  count, batch_size, seed, index, processes, words
):
  with pytest.raises(ValueError, match=words):
    pipeline.batches(
      _rows(count),
      batch_size=batch_size,
      seed=seed,
      process_index=index,
      process_count=processes,
    )


def test_too_little_text_for_a_batch_names_values_that_fit():
  rows = packing.pack([np.arange(1, 22)], 16, 2)
  words = "2 rows .*=16, fewer than data.batch_size=4; .*size to 2 or .* to 4,"
  with pytest.raises(ValueError, match=words):
    pipeline.check_rows(rows, 4, 2, 1)
  shorter = packing.pack([np.arange(1, 22)], 4, 2)
  pipeline.check_rows(shorter, 4, 2, 1)
  with pytest.raises(ValueError, match="fills 0 rows.*; give more text"):
    pipeline.check_rows(packing.pack([], 16), 4, 1, 1)


def test_a_negative_limit_is_refused():
  with pytest.raises(ValueError, match="eval.batches must be 0"):
    pipeline.eval_batches(_rows(4), batch_size=2, limit=-1)
