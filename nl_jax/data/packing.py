"""The packer: documents to rows of equal length, every token exactly once.

A document d (tokens and an end id) gives the pairs inputs = d[:-1], targets =
d[1:], so that no target crosses into another document. Pairs are padded to a
multiple of `alignment`, laid end to end, and cut into rows. A long document
continues in the next row, as a new segment. Because `alignment` divides the
row, segments start at multiples of it only: memories reset at chunk edges
(docs/mathematics.md 2.7, `aligned`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from nl_jax.data import errors, tokenizers

Rows = dict[str, np.ndarray]  # {inputs, targets, weights, segment_ids} [N,T].


class Table(Protocol):
  """Rows that are not in memory.

  Attributes:
    sequence_length: T.
  """

  sequence_length: int

  def __len__(self) -> int:
    """Number of rows."""

  def take(self, index_B: np.ndarray) -> Rows:
    """Some rows, [B,T] each."""


def tokenize(
  documents: Iterable[str], tokenizer: tokenizers.Tokenizer
) -> list[np.ndarray]:
  """The int32 tokens of each document, with the end id.

  [length + 1], and one more where documents have a begin id.
  """
  end = np.asarray([tokenizer.end_id], np.int32)
  first = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
  begin = np.asarray(first, np.int32)
  return [np.concatenate([begin, tokenizer.encode(d), end]) for d in documents]


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
  packer = Packer(sequence_length, alignment, pad_id)
  return concatenate([packer.push(documents), packer.flush()])


class Packer:
  """Packs documents as they come; rows are those of `pack` over all.

  Holds less than one row between two calls.
  """

  def __init__(self, sequence_length: int, alignment: int, pad_id: int):
    """Args: as of `pack`."""
    check_lengths(sequence_length, alignment)
    self._length, self._alignment = sequence_length, alignment
    self._pad_id = pad_id
    self._seen = 0  # Documents: their numbers must grow from row to row.
    self._rest = _Flat(*(np.zeros(0, np.int32),) * 3)

  def push(self, documents: Sequence[np.ndarray]) -> Rows:
    """The rows that are full with these documents."""
    new = _lay(documents, self._alignment, self._pad_id, self._seen)
    self._seen += len(documents)
    flat = _Flat(*map(np.concatenate, zip(self._rest, new)))
    full = len(flat.inputs) // self._length * self._length
    self._rest = _Flat(*(x[full:].copy() for x in flat))
    return self._rows(_Flat(*(x[:full] for x in flat)))

  def flush(self) -> Rows:
    """The last row, filled with padding; none where nothing is left."""
    rest = self._rest
    missing = -len(rest.inputs) % self._length
    pad = lambda x, value: np.pad(x, (0, missing), constant_values=value)
    self._rest = _Flat(*(x[:0] for x in rest))
    return self._rows(
      _Flat(
        pad(rest.inputs, self._pad_id),
        pad(rest.targets, self._pad_id),
        pad(rest.owners, -1),
      )
    )

  def _rows(self, flat: "_Flat") -> Rows:
    in_rows = lambda x: x.reshape(-1, self._length)
    segment_ids = _segments(in_rows(flat.owners))
    return {
      "inputs": in_rows(flat.inputs),
      "targets": in_rows(flat.targets),
      "weights": (segment_ids > 0).astype(np.float32),
      "segment_ids": segment_ids,
    }


class _Flat(NamedTuple):
  """Pairs laid end to end, [positions] each.

  Attributes:
    inputs, targets: int32 ids.
    owners: int32 number of the document, -1 for padding.
  """

  inputs: np.ndarray
  targets: np.ndarray
  owners: np.ndarray


def _lay(
  documents: Sequence[np.ndarray], alignment: int, pad_id: int, first: int
) -> _Flat:
  """Documents end to end, each padded to the alignment."""
  lengths = np.asarray([len(d) - 1 for d in documents], np.int64)
  lengths = np.maximum(lengths, 0)
  ends = np.cumsum(-(-lengths // alignment) * alignment)
  size = int(ends[-1]) if len(ends) else 0
  flat = _Flat(*(np.full(size, x, np.int32) for x in (pad_id, pad_id, -1)))
  starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
  for index, document in enumerate(documents):
    place = slice(starts[index], starts[index] + lengths[index])
    flat.inputs[place] = document[:-1]
    flat.targets[place] = document[1:]
    flat.owners[place] = first + index
  return flat


def concatenate(parts: Sequence[Rows]) -> Rows:
  """Rows of several packs, one after the other."""
  return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def join(parts: Sequence["Rows | Table"]) -> "Rows | Table":
  """One table of several, their rows one after the other."""
  if len(parts) == 1:
    return parts[0]
  held = [part for part in parts if isinstance(part, dict)]
  if len(held) == len(parts):
    return concatenate(held)
  return _Joined(parts)


class _Joined:
  """Tables one after the other."""

  def __init__(self, parts: Sequence["Rows | Table"]):
    self._parts = parts
    self._ends = np.cumsum([count(part) for part in parts])
    self.sequence_length = width(parts[0])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def take(self, index_B: np.ndarray) -> Rows:
    owner_B = np.searchsorted(self._ends, index_B, side="right")
    taken: Rows = {}
    for owner in np.unique(owner_B):
      chosen_B = owner_B == owner
      start = self._ends[owner - 1] if owner else 0
      some = take(self._parts[owner], index_B[chosen_B] - start)
      for key, x in some.items():
        whole = taken.setdefault(
          key, np.zeros((len(index_B), x.shape[1]), x.dtype)
        )
        whole[chosen_B] = x
    return taken


def width(rows: "Rows | Table") -> int:
  """T."""
  if isinstance(rows, dict):
    return rows["inputs"].shape[1]
  return rows.sequence_length


def count(rows: "Rows | Table") -> int:
  """Number of rows."""
  return len(rows["inputs"]) if isinstance(rows, dict) else len(rows)


def take(rows: "Rows | Table", index_B: np.ndarray) -> Rows:
  """A copy of some rows, [B,T] each."""
  if isinstance(rows, dict):
    return {key: x[index_B] for key, x in rows.items()}
  return rows.take(index_B)


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
