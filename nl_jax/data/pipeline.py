"""The pipeline: packed rows to batches, sharded by process, resumed in O(1).

The order is a function of the seed and of the numbers of rows alone: epochs of
a seeded shuffle, of each part of a mixture its own, batch k being rows k *
batch_size and on. A process takes its slice of each batch, so the global
batches are the same for any number of processes, and the whole state is one
integer, the number of rows drawn: it means the same for any size of a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from nl_jax.data import errors, packing, sources, tokenizers

Batch = dict[str, np.ndarray]  # {inputs, targets, weights, segment_ids} [B,T].
_READERS = 4  # Threads that read rows from disk.
_AHEAD = 4  # Batches that they read before they are asked for.
# Rows, more than any run reads: grain takes lengths for floats, and what it
# calls infinite, 2^63 - 1, then has no length in batches of one row.
FAR = 2**48


class Mix(NamedTuple):
  """Parts of a table, one after the other, and how often each is drawn.

  Attributes:
    counts: rows of each part.
    weights: shares of the rows drawn, up to a factor.
  """

  counts: tuple[int, ...]
  weights: tuple[float, ...] = (1.0,)


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
) -> "Batches":
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
  rows: packing.Rows | packing.Table,
  *,
  batch_size: int,
  seed: int,
  mix: Mix | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> "Batches":
  """Endless shuffled batches; every row once an epoch, in a new order each.

  Args:
    rows: arrays [N,T] of the packer, or a table; on every process the same.
    batch_size: rows of a global batch, a multiple of process_count.
    seed: of the shuffle, in [0, 2**32).
    mix: the parts of rows, each with epochs of its own; None: one part.
    process_index: which slice of each batch to give.
    process_count: number of slices.

  Returns:
    A grain iterator of dicts of [batch_size / process_count, T]. Its state is
    {"next_row": rows drawn}, good for any process count and batch size.

  Raises:
    ValueError: batch_size or the process does not fit, a seed out of range.
  """
  check_batch(batch_size, process_index, process_count)
  take, size = _slice_of(batch_size, process_index, process_count)
  mix = Mix((packing.count(rows),)) if mix is None else mix
  order, options = _order(mix, seed), reading(rows)

  def begin(row: int) -> grain.DatasetIterator:
    indices = order.slice(slice(row, FAR)).batch(batch_size)
    dataset = indices.map(lambda index_B: _gather(rows, index_B[take], size))
    return iter(dataset.to_iter_dataset(options))

  return Batches(begin, batch_size)


def reading(rows: packing.Rows | packing.Table) -> grain.ReadOptions:
  """How batches are read ahead; from memory a thread would cost more."""
  in_memory = isinstance(rows, dict)
  return grain.ReadOptions(
    num_threads=0 if in_memory else _READERS,
    prefetch_buffer_size=0 if in_memory else _AHEAD,
  )


class Batches(grain.DatasetIterator):
  """Batches from any row of the order on; the place is a number of rows."""

  def __init__(
    self, begin: Callable[[int], grain.DatasetIterator], batch_size: int
  ):
    """Args: what reads whole batches from a row on, and rows of a batch."""
    super().__init__()
    self._begin, self._size = begin, batch_size
    self._start, self._batches = 0, begin(0)

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, int]:
    done = self._batches.get_state()["next_index"]
    return {"next_row": self._start + done * self._size}

  def set_state(self, state: dict[str, int]) -> None:
    done, start = divmod(state["next_row"], self._size)
    if start != self._start:
      # Another batch size left a row in the middle of a batch.
      self._start, self._batches = start, self._begin(start)
    self._batches.set_state({"next_index": done})


def eval_batches(
  rows: packing.Rows | packing.Table,
  *,
  batch_size: int,
  limit: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Sequence[Batch]:
  """All rows in order, once; the last batch is filled with empty rows.

  A batch is made when it is asked for: of a large corpus none is kept.

  Args:
    rows: arrays [N,T] of the packer, or a table.
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
  count = packing.count(rows)
  index_N = np.arange(count)
  if 0 < limit * batch_size < count:
    spread = np.linspace(0, count, limit * batch_size, endpoint=False)
    index_N = spread.astype(np.int64)
  take, size = _slice_of(batch_size, process_index, process_count)
  starts = range(0, len(index_N), batch_size)
  return _Held(rows, [index_N[i : i + batch_size][take] for i in starts], size)


class _Held(Sequence[Batch]):
  """Batches of given rows, read one by one."""

  def __init__(
    self,
    rows: packing.Rows | packing.Table,
    chosen: list[np.ndarray],
    size: int,
  ):
    self._rows, self._chosen, self._size = rows, chosen, size

  def __len__(self) -> int:
    return len(self._chosen)

  # Nobody asks for slices.
  def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
    return _gather(self._rows, self._chosen[index], self._size)


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
  rows: packing.Rows | packing.Table,
  batch_size: int,
  alignment: int,
  process_count: int,
) -> None:
  """Raises ValueError where there are fewer rows than a batch takes."""
  count, sequence_length = packing.count(rows), packing.width(rows)
  if count >= batch_size:
    return
  advice = []
  if smaller := count // process_count * process_count:
    advice.append(f"data.batch_size to {smaller}")
  extent = 0
  if count:
    segments = packing.take(rows, np.arange(count))["segment_ids"]
    extent = int(np.flatnonzero(segments)[-1]) + 1
  if shorter := extent // batch_size // alignment * alignment:
    advice.append(f"data.sequence_length to {shorter}")
  lower = f"lower {' or '.join(advice)}, or " if advice else ""
  raise ValueError(
    f"the text fills {count} rows of data.sequence_length={sequence_length}, "
    f"fewer than data.batch_size={batch_size}; {lower}give more text"
  )


def order_sample(mix: Mix, seed: int) -> list[int]:
  """Some row numbers of the order, to notice when grain shuffles otherwise."""
  count = sum(mix.counts)
  order = _order(mix, seed)
  return [
    int(order[i]) for start in (0, count) for i in range(start, start + 8)
  ]


def _order(mix: Mix, seed: int) -> grain.MapDataset:
  """Row numbers, endless: a new permutation of each part each epoch."""
  check_seed(seed)
  parts, start = [], 0
  for number, count in enumerate(mix.counts):
    part = grain.MapDataset.range(start, start + count)
    # Parts of the same length must not go in step.
    order = part.shuffle(seed=(seed + number) % 2**32)
    parts.append(order.repeat(FAR // max(count, 1)))
    start += count
  if len(parts) == 1:
    return parts[0]
  return grain.MapDataset.mix(parts, list(mix.weights))


def _slice_of(
  batch_size: int, process_index: int, process_count: int
) -> tuple[slice, int]:
  """This process's part of a batch, and its length."""
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size), size


def _gather(
  rows: packing.Rows | packing.Table, index_B: np.ndarray, size: int
) -> Batch:
  """Copies rows, and lays empty ones after them to make `size`."""
  padding = ((0, size - len(index_B)), (0, 0))
  taken = packing.take(rows, index_B)
  return {key: np.pad(x, padding) for key, x in taken.items()}
