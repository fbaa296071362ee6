"""Rows as a batch, and the two accuracies, by hand."""

import numpy as np
import pytest

from nl_jax.tasks import batches


@pytest.fixture
def batch():
  rows = [[5, 6, 7], [8, 9], [4]]
  none = batches.NO_LABEL
  return batches.labelled(rows, [[1, none, 2], [3, 3], [2]], 4)


def test_rows_end_in_padding(batch):
  np.testing.assert_array_equal(batch["inputs"][1], [8, 9, 0, 0])
  np.testing.assert_array_equal(batch["segment_ids"][1], [1, 1, 0, 0])
  np.testing.assert_array_equal(batch["targets"][0], [1, 0, 2, 0])
  np.testing.assert_array_equal(batch["weights"][0], [1, 0, 1, 0])


def test_accuracies(batch):
  # Right: both of row 0, one of two in row 1, none in row 2; what stands
  # where nothing is asked plays no part.
  predictions = np.array([[1, 9, 2, 9], [3, 1, 3, 3], [0, 2, 2, 2]])
  assert batches.position_accuracy(predictions, batch) == 3 / 5
  assert batches.sequence_accuracy(predictions, batch) == 1 / 3


def test_joined_batches_are_padded(batch):
  longer = batches.labelled([[1] * 6], [[2] * 6], 6)
  both = batches.joined([batch, longer])
  assert both["inputs"].shape == (4, 6)
  assert both["weights"].sum() == 5 + 6
  np.testing.assert_array_equal(both["segment_ids"][0], [1, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(
    batches.take(both, np.array([3, 0]))["targets"][0], [2] * 6
  )


def test_standard_error():
  assert batches.standard_error(0.25, 4) == pytest.approx(0.25)
  assert np.isnan(batches.standard_error(0.5, 1))


def test_a_row_that_is_too_long_is_refused():
  with pytest.raises(ValueError, match="row 1 has 3 ids and 3 labels"):
    batches.labelled([[1], [1, 2, 3]], [[1], [1, 2, 3]], 2)
