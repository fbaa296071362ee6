"""A data set: one source, tokenizer and packing, bound to its batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nl_jax.data import packing, sources, tokenizers

if TYPE_CHECKING:
  import grain

_FORMAT = 1  # Raise it when the packer lays the same tokens out otherwise.


class Counts(NamedTuple):
  """Sizes of a split.

  Attributes:
    documents: number of documents.
    bytes: their UTF-8 bytes.
    tokens: pairs to predict, end ids included; padding is not counted.
    rows: packed rows.
  """

  documents: int
  bytes: int
  tokens: int
  rows: int


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What a training run reads; made by `load`.

  Attributes:
    source: the documents.
    tokenizer: text to ids and back.
    train: endless iterator of this process's batches; `get_state()` is
      {"next_index": batches drawn}, `set_state` takes it, on any process count.
    fingerprint: SHA-256 (hex) of all that decides the training batches but
      their size: source, tokenizer, packing, seed and shuffle.
    counts: sizes of the splits "train" and "validation".
    rows: the packed rows of the splits.
    batch_size: rows of a global batch.
    process_index: this process.
    process_count: number of processes.
  """

  source: sources.Source
  tokenizer: tokenizers.Tokenizer
  train: grain.DatasetIterator = dataclasses.field(repr=False)
  fingerprint: str
  counts: dict[str, Counts]
  rows: dict[str, packing.Rows] = dataclasses.field(repr=False)
  batch_size: int
  process_index: int
  process_count: int

  def validation(self, batches: int = 0) -> list[dict[str, np.ndarray]]:
    """The held-out batches of this process, always the same.

    Args:
      batches: how many, spread evenly over the split; 0: the whole split.
    """
    from nl_jax.data import pipeline

    return pipeline.eval_batches(
      self.rows["validation"],
      batch_size=self.batch_size,
      limit=batches,
      process_index=self.process_index,
      process_count=self.process_count,
    )

  def describe(self) -> str:
    """One line for logs: source, tokenizer, tokens and rows of the splits."""
    sizes = ", ".join(
      f"{split} {c.tokens:,} tokens in {c.rows:,} rows"
      for split, c in self.counts.items()
    )
    return (
      f"{self.source.describe()}; tokenizer {self.tokenizer.name}: {sizes}; "
      f"fingerprint {self.fingerprint[:12]}"
    )


def load(
  *,
  source: str,
  path: str = "",
  tokenizer: str = "bytes",
  sequence_length: int,
  batch_size: int,
  seed: int = 0,
  alignment: int = 1,
  vocab_size: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Dataset:
  """Loads, tokenises and packs a source; the config group `data`.

  Args:
    source: "embedded", "text" or "synthetic" (`sources.load`).
    path: file or folder of source "text".
    tokenizer: "bytes", or the path of a SentencePiece model.
    sequence_length: tokens in a row, a multiple of alignment.
    batch_size: rows of a batch over all processes.
    seed: of the order, and of the documents of "synthetic".
    alignment: documents start at its multiples: `model.alignment`.
    vocab_size: of the model, checked against the tokenizer's when given.
    process_index: this process.
    process_count: number of processes; each reads all text, draws its slice.

  Raises:
    ValueError: a value that does not fit; the sentence names the keys.
    FileNotFoundError: a missing file.
  """
  # Grain takes seconds to import: only when batches are wanted.
  from nl_jax.data import pipeline

  packing.check_lengths(sequence_length, alignment)
  pipeline.check_batch(batch_size, process_index, process_count)
  pipeline.check_seed(seed)
  ids = tokenizers.load(tokenizer)
  if vocab_size is not None:
    tokenizers.check_vocabulary(ids, vocab_size)
  text = sources.load(source, path, seed)
  rows, counts = {}, {}
  for split in sources.SPLITS:
    rows[split], counts[split] = _pack(
      text.documents(split), ids, sequence_length, alignment
    )
  pipeline.check_rows(rows["train"], batch_size, alignment, process_count)
  if not counts["validation"].rows:
    raise ValueError(
      f"the text held out of data.source={source!r} data.path={path!r} has no "
      "tokens; give more text"
    )
  order = pipeline.order_sample(rows["train"], seed)
  train = pipeline.batches(
    rows["train"],
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )
  parts = [_FORMAT, text.fingerprint, ids.fingerprint]
  parts += [sequence_length, alignment, order]
  return Dataset(
    source=text,
    tokenizer=ids,
    train=train,
    fingerprint=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
    counts=counts,
    rows=rows,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )


def _pack(
  documents: tuple[str, ...],
  tokenizer: tokenizers.Tokenizer,
  sequence_length: int,
  alignment: int,
) -> tuple[packing.Rows, Counts]:
  rows = packing.pack(
    packing.tokenize(documents, tokenizer),
    sequence_length,
    alignment,
    tokenizer.pad_id,
  )
  counts = Counts(
    documents=len(documents),
    bytes=sum(len(document.encode("utf-8")) for document in documents),
    tokens=int(np.count_nonzero(rows["segment_ids"])),
    rows=len(rows["inputs"]),
  )
  return rows, counts
