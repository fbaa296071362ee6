"""The packer: documents to rows of equal length, every token exactly once.

A document d (tokens and an end id) gives the pairs inputs = d[:-1],
targets = d[1:], so that no target crosses into another document. Pairs are
padded to a multiple of `alignment`, laid end to end, and cut into rows. A long
document goes on in the next row, as a new segment. Because `alignment` divides
the row, segments start at multiples of it only: memories reset at chunk edges
(model.md section 2.7, `aligned`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from nl_jax.data import errors, tokenizers

Rows = dict[str, np.ndarray]  # {inputs, targets, weights, segment_ids} [N,T].


def tokenize(
  documents: Iterable[str], tokenizer: tokenizers.Tokenizer
) -> list[np.ndarray]:
  """The int32 tokens [length + 1] of each document, with the end id."""
  end = np.asarray([tokenizer.end_id], np.int32)
  return [np.concatenate([tokenizer.encode(d), end]) for d in documents]


def pack(
  documents: Sequence[np.ndarray],
  sequence_length: int,
  alignment: int = 1,
  pad_id: int = 0,
) -> Rows:
  """Packs documents into rows; linear in the number of tokens.

  Args:
    documents: int tokens of each, end id included. A document of the end id
      alone has no pair and leaves no trace.
    sequence_length: tokens in a row, a multiple of alignment.
    alignment: segments start at its multiples.
    pad_id: fills inputs and targets of padding; weight and segment are 0 there.

  Returns:
    inputs, targets int32, weights float32 (1 for pairs), segment_ids int32
    (1, 2, ... within a row, 0 for padding), each [rows, sequence_length].

  Raises:
    ValueError: alignment does not divide sequence_length.
  """
  check_lengths(sequence_length, alignment)
  lengths = np.asarray([len(d) - 1 for d in documents], np.int64)
  lengths = np.maximum(lengths, 0)
  ends = np.cumsum(-(-lengths // alignment) * alignment)
  total = int(ends[-1]) if len(ends) else 0
  size = -(-total // sequence_length) * sequence_length
  inputs = np.full(size, pad_id, np.int32)
  targets = np.full(size, pad_id, np.int32)
  owners = np.full(size, -1, np.int32)  # Index of the document, -1: padding.
  starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
  for index, document in enumerate(documents):
    place = slice(starts[index], starts[index] + lengths[index])
    inputs[place] = document[:-1]
    targets[place] = document[1:]
    owners[place] = index
  rows = {"inputs": inputs, "targets": targets}
  rows = {key: x.reshape(-1, sequence_length) for key, x in rows.items()}
  segment_ids = _segments(owners.reshape(-1, sequence_length))
  weights = (segment_ids > 0).astype(np.float32)
  return rows | {"weights": weights, "segment_ids": segment_ids}


def check_lengths(sequence_length: int, alignment: int) -> None:
  """Raises ValueError unless rows hold whole multiples of the alignment."""
  errors.require_positive(sequence_length=sequence_length, alignment=alignment)
  errors.require_multiple(
    "data.sequence_length",
    sequence_length,
    "the alignment of the model (its memory chunks)",
    alignment,
  )


def _segments(owners_NxT: np.ndarray) -> np.ndarray:
  """Numbers the documents of each row 1, 2, ...; padding 0."""
  # Owners (-1: padding) grow at each start of a document, and only there.
  starts_NxT = np.diff(owners_NxT, axis=1, prepend=-1) > 0
  ids_NxT = np.cumsum(starts_NxT, axis=1, dtype=np.int32)
  return np.where(owners_NxT >= 0, ids_NxT, np.int32(0))
