"""The pipeline: packed rows to batches, sharded by process, resumed in O(1).

The order is a function of (seed, number of rows) alone: epochs of a seeded
shuffle, batch k being rows k * batch_size and on. A process takes its slice of
each batch, so the global batches are the same for any number of processes, and
the whole state is one integer, the number of batches drawn.
"""

import grain
import numpy as np

from nl_jax.data import errors, packing, sources, tokenizers

Batch = dict[str, np.ndarray]  # {inputs, targets, weights, segment_ids} [B,T].


def make(
  source: sources.Source,
  tokenizer: tokenizers.Tokenizer,
  *,
  sequence_length: int,
  batch_size: int,
  alignment: int,
  seed: int,
  split: str = "train",
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Packs one split of a source; returns `batches` of its rows."""
  documents = packing.tokenize(source.documents(split), tokenizer)
  rows = packing.pack(documents, sequence_length, alignment, tokenizer.pad_id)
  check_rows(rows, batch_size, alignment, process_count)
  return batches(
    rows,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )


def batches(
  rows: packing.Rows,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Endless shuffled batches; every row once an epoch, in a new order each.

  Args:
    rows: arrays [N,T] of the packer, on every process the same.
    batch_size: rows of a global batch, a multiple of process_count.
    seed: of the shuffle, in [0, 2**32).
    process_index: which slice of each batch to give.
    process_count: number of slices.

  Returns:
    A grain iterator of dicts of [batch_size / process_count, T]. Its state is
    {"next_index": batches drawn}, good for any process count.

  Raises:
    ValueError: batch_size or the process does not fit, a seed out of range.
  """
  check_batch(batch_size, process_index, process_count)
  take, size = _slice_of(batch_size, process_index, process_count)
  indices = _order(len(rows["inputs"]), seed).batch(batch_size)
  dataset = indices.map(lambda index_B: _gather(rows, index_B[take], size))
  # Rows are in memory: a prefetch thread would cost more than it hides, and
  # the state would have to leave out what waits in its buffer.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(dataset.to_iter_dataset(options))


def eval_batches(
  rows: packing.Rows,
  *,
  batch_size: int,
  limit: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> list[Batch]:
  """All rows in order, once; the last batch is filled with empty rows.

  Args:
    rows: arrays [N,T] of the packer.
    batch_size: rows of a global batch, a multiple of process_count.
    limit: number of batches, their rows spread evenly over all; 0: all rows.
    process_index: which slice of each batch to give.
    process_count: number of slices.

  Returns:
    The same number of batches on every process; empty rows have weight 0 and
    segment 0.

  Raises:
    ValueError: batch_size or the process does not fit, a negative limit.
  """
  check_batch(batch_size, process_index, process_count)
  if limit < 0:
    raise ValueError(f"eval.batches must be 0 (all) or more, got {limit}")
  count = len(rows["inputs"])
  index_N = np.arange(count)
  if 0 < limit * batch_size < count:
    index_N = np.linspace(0, count, limit * batch_size, endpoint=False)
    index_N = index_N.astype(np.int64)
  take, size = _slice_of(batch_size, process_index, process_count)
  return [
    _gather(rows, index_N[start : start + batch_size][take], size)
    for start in range(0, len(index_N), batch_size)
  ]


def check_batch(
  batch_size: int, process_index: int, process_count: int
) -> None:
  """Raises ValueError unless a batch can be cut into equal slices."""
  errors.require_positive(batch_size=batch_size, process_count=process_count)
  errors.require_multiple(
    "data.batch_size", batch_size, "the number of processes", process_count
  )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must be in [0, {process_count}), got {process_index}"
    )


def check_seed(seed: int) -> None:
  """Raises ValueError for a seed that grain's shuffle does not take."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"data.seed must be in [0, 2**32), got {seed}")


def check_rows(
  rows: packing.Rows, batch_size: int, alignment: int, process_count: int
) -> None:
  """Raises ValueError where there are fewer rows than a batch takes."""
  count, sequence_length = rows["inputs"].shape
  if count >= batch_size:
    return
  advice = []
  if smaller := count // process_count * process_count:
    advice.append(f"data.batch_size to {smaller}")
  extent = int(np.flatnonzero(rows["segment_ids"])[-1]) + 1 if count else 0
  if shorter := extent // batch_size // alignment * alignment:
    advice.append(f"data.sequence_length to {shorter}")
  lower = f"lower {' or '.join(advice)}, or " if advice else ""
  raise ValueError(
    f"the text fills {count} rows of data.sequence_length={sequence_length}, "
    f"fewer than data.batch_size={batch_size}; {lower}give more text"
  )


def order_sample(rows: packing.Rows, seed: int) -> list[int]:
  """Some row numbers of the order, to notice when grain shuffles otherwise."""
  count = len(rows["inputs"])
  order = _order(count, seed)
  return [
    int(order[i]) for start in (0, count) for i in range(start, start + 8)
  ]


def _order(count: int, seed: int) -> grain.MapDataset:
  """Row numbers, endless: a new permutation each epoch."""
  check_seed(seed)
  return grain.MapDataset.range(count).shuffle(seed=seed).repeat()


def _slice_of(
  batch_size: int, process_index: int, process_count: int
) -> tuple[slice, int]:
  """This process's part of a batch, and its length."""
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size), size


def _gather(rows: packing.Rows, index_B: np.ndarray, size: int) -> Batch:
  """Copies rows, and lays empty ones behind them to make `size`."""
  padding = ((0, size - len(index_B)), (0, 0))
  return {key: np.pad(x[index_B], padding) for key, x in rows.items()}
