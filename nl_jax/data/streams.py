"""Batches of streams: rows in the order in which they follow each other.

A table of packed rows is cut into as many runs of neighbours as there are
streams. Each batch holds the next rows of every stream; a stream that has read
its last row continues with its first. So a model can carry its memory from row
to row, document after document. Every row is read once an epoch, as by
`pipeline.batches`; only the order differs, and it has no seed.
"""

import math
from collections.abc import Sequence

import grain
import numpy as np

from nl_jax.data import errors, packing, pipeline


def make(
  rows: packing.Rows | packing.Table,
  *,
  batch_size: int,
  end_id: int,
  reset: str = "document",
  consecutive: int = 1,
  mix: pipeline.Mix | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> pipeline.Batches:
  """Endless batches [streams * consecutive, T] of rows that follow each other.

  Row s * consecutive + j of batch t is row t * consecutive + j of stream s.
  Its `segment_ids` number documents from that of the row before: with
  `reset="document"` 1 is the document that the row before ended in, and each
  new one is one more; with "never" every token is of document 1. 0 is padding.

  Args:
    rows: arrays [N,T] of the packer, or a table; on every process the same.
    batch_size: rows of a global batch, a multiple of consecutive.
    end_id: the token that ends documents.
    reset: "document" or "never".
    consecutive: rows of a stream in a batch.
    mix: the parts of rows; each gets streams by its weight, in whole numbers.
      None: one part.
    process_index: which slice of each batch to give.
    process_count: number of slices, a divisor of the number of streams.

  Raises:
    ValueError: the numbers do not fit.
  """
  if consecutive < 1:
    raise ValueError(
      f"train.carry_gradient must be at least 1 row, got {consecutive}"
    )
  errors.require_multiple(
    "data.batch_size", batch_size, "train.carry_gradient", consecutive
  )
  count = batch_size // consecutive
  errors.require_multiple(
    "the number of streams", count, "the number of processes", process_count
  )
  mix = pipeline.Mix((packing.count(rows),)) if mix is None else mix
  starts, lengths = _spans(mix, count)
  size = count // process_count
  mine = slice(process_index * size, (process_index + 1) * size)
  start_S, length_S = starts[mine, None], lengths[mine, None]

  def batch(number: int) -> pipeline.Batch:
    place = (number * consecutive + np.arange(consecutive)) % length_S
    index_B, place_B = (start_S + place).ravel(), place.ravel()
    taken = packing.take(rows, index_B)
    # A stream's first row continues with none: its neighbour is another's.
    before = packing.take(rows, np.maximum(index_B - 1, 0))
    goes_on_B = (place_B > 0) & _goes_on(before, end_id)
    ids = taken["segment_ids"]
    numbered = ids + 1 - goes_on_B[:, None]
    if reset == "never":
      numbered = np.ones_like(ids)
    taken["segment_ids"] = np.where(ids > 0, numbered, 0).astype(np.int32)
    return taken

  dataset = grain.MapDataset.range(pipeline.FAR // batch_size).map(batch)

  def begin(row: int) -> grain.DatasetIterator:
    if row:
      raise ValueError(
        f"the run stands at row {row} of a batch of {batch_size}; "
        "data.rows=stream resumes with the same batch size only"
      )
    return iter(dataset.to_iter_dataset(pipeline.reading(rows)))

  return pipeline.Batches(begin, batch_size)


def _spans(mix: pipeline.Mix, streams: int) -> tuple[np.ndarray, np.ndarray]:
  """The first row of each stream and the number of its rows, [streams] each.

  Args:
    mix: the parts of a table; the streams of each are in proportion to its
      weight, rounded, and at least one.
    streams: how many.

  Raises:
    ValueError: fewer streams than parts, or a part with fewer rows than
      streams.
  """
  parts = len(mix.counts)
  if streams < parts:
    raise ValueError(
      f"data.rows=stream has {streams} streams for the {parts} parts of the "
      "mixture; raise data.batch_size to give each part one at least"
    )
  starts, lengths, first = [], [], 0
  for rows, share in zip(mix.counts, _shares(mix.weights, streams)):
    if rows < share:
      raise ValueError(
        f"the text fills {rows} rows, fewer than its {share} streams; lower "
        "data.batch_size or data.sequence_length, or give more text"
      )
    edges = np.arange(share + 1) * rows // share
    starts.append(first + edges[:-1])
    lengths.append(np.diff(edges))
    first += rows
  return np.concatenate(starts), np.concatenate(lengths)


def _shares(weights: Sequence[float], streams: int) -> list[int]:
  """Whole numbers in proportion to the weights, each 1 or more."""
  free, total = streams - len(weights), math.fsum(weights)
  exact = [free * weight / total for weight in weights]
  shares = [int(x) for x in exact]
  by_rest = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
  for i in by_rest[: free - sum(shares)]:
    shares[i] += 1
  return [1 + share for share in shares]


def _goes_on(before: packing.Rows, end_id: int) -> np.ndarray:
  """bool [B]: the document at the end of each row has not ended there."""
  full = before["segment_ids"][:, -1] > 0
  return full & (before["targets"][:, -1] != end_id)
