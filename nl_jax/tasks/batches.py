"""Labelled rows as a batch, and how right predictions of them are.

A batch is what the trainer takes (docs/architecture.md 3): `inputs`, `targets`,
`weights`, `segment_ids`, each [N,T]. A target is a label of its own position;
weights are 1 where there is one. Rows shorter than T end in padding: id 0 of
segment 0.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Batch = dict[str, np.ndarray]
NO_LABEL = -100


def labelled(
  rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], length: int
) -> Batch:
  """The batch of some rows.

  Args:
    rows: ids of each row.
    labels: of each position of each row; NO_LABEL where there is none.
    length: T.

  Raises:
    ValueError: a row is longer than that, or has another number of labels.
  """
  shape = (len(rows), length)
  inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
  for i, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
    if len(row) > length or len(row) != len(row_labels):
      raise ValueError(
        f"row {i} has {len(row)} ids and {len(row_labels)} labels, expected as "
        f"many of both and at most {length}"
      )
    known = np.asarray(row_labels) != NO_LABEL
    inputs[i, : len(row)] = row
    targets[i, : len(row)] = np.where(known, row_labels, 0)
    weights[i, : len(row)] = known
    segments[i, : len(row)] = 1
  return dict(
    inputs=inputs, targets=targets, weights=weights, segment_ids=segments
  )


def take(batch: Mapping[str, np.ndarray], rows: np.ndarray) -> Batch:
  """Rows of a batch, in the order given."""
  return {name: x[rows] for name, x in batch.items()}


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Batch:
  """Batches below each other, padded to the longest."""
  length = max(part["inputs"].shape[1] for part in parts)
  widen = lambda x: np.pad(x, ((0, 0), (0, length - x.shape[1])))
  return {
    name: np.concatenate([widen(part[name]) for part in parts])
    for name in parts[0]
  }


def position_accuracy(
  predictions_NxT: np.ndarray, batch: Mapping[str, np.ndarray]
) -> float:
  """Share of the labelled positions that are right, over all rows."""
  asked = batch["weights"] > 0
  right = (predictions_NxT == batch["targets"]) & asked
  return float(right.sum() / asked.sum())


def sequence_accuracy(
  predictions_NxT: np.ndarray, batch: Mapping[str, np.ndarray]
) -> float:
  """Share of the rows of which every labelled position is right."""
  wrong = (predictions_NxT != batch["targets"]) & (batch["weights"] > 0)
  return float(np.mean(~wrong.any(axis=1)))


def standard_error(share: float, count: int) -> float:
  """Of the mean of `count` zeros and ones: sqrt(p (1 - p) / (count - 1))."""
  return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
