"""A prepared corpus: packed rows in ArrayRecord shards, and their manifest.

A record is one row, [inputs T][targets T][segment_ids T] as little-endian
integers, so a row is read without the others and a run holds none in memory.
`manifest.json` says what the shards are made of and how; its hash is the
fingerprint of the corpus. `preparation` writes both.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nl_jax import files, formats
from nl_jax.data import errors, packing

MANIFEST = "manifest.json"
FORMAT = 1  # Of the manifest and its shards.
PREPARE_AGAIN = "prepare the corpus again into another --out"
SHARD = {"file": str, "split": str, "rows": int, "bytes": int}
COUNTS = dict.fromkeys(("documents", "bytes", "tokens", "rows"), int)
_SHAPE = {
  "sequence_length": int,
  "alignment": int,
  "vocab_size": int,
  "opening": str,
  "tokenizer": {"name": str, "fingerprint": str},
  "counts": {"train": COUNTS, "validation": COUNTS},
  "shards": [SHARD],
}


class Layout:
  """How a row is a record.

  Attributes:
    sequence_length: T.
    bytes: of a record.
  """

  def __init__(self, sequence_length: int, vocab_size: int):
    """Args: T, and the number of ids."""
    self.sequence_length = sequence_length
    self._ids = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    self._segments = np.dtype("<u2" if sequence_length < 2**16 else "<u4")
    self.bytes = sequence_length * (
      2 * self._ids.itemsize + self._segments.itemsize
    )

  def records(self, rows: packing.Rows) -> list[bytes]:
    """The records of rows [N,T]."""
    parts = [
      np.ascontiguousarray(rows[key].astype(dtype)).view(np.uint8)
      for key, dtype in self._columns()
    ]
    return [row.tobytes() for row in np.concatenate(parts, axis=1)]

  def rows(self, records: list[bytes]) -> packing.Rows:
    """The rows [N,T] of records."""
    flat = np.frombuffer(b"".join(records), np.uint8)
    flat = flat.reshape(len(records), self.bytes)
    rows, start = {}, 0
    for key, dtype in self._columns():
      stop = start + self.sequence_length * dtype.itemsize
      column = np.ascontiguousarray(flat[:, start:stop]).view(dtype)
      rows[key], start = column.astype(np.int32), stop
    rows["weights"] = (rows["segment_ids"] > 0).astype(np.float32)
    return rows

  def _columns(self) -> tuple[tuple[str, np.dtype], ...]:
    return (
      ("inputs", self._ids),
      ("targets", self._ids),
      ("segment_ids", self._segments),
    )


class Table:
  """The rows of a split; reads those that are asked for.

  Attributes:
    sequence_length: T.
  """

  def __init__(self, folder: pathlib.Path, split: str, manifest: Mapping):
    """Opens the shards of a split.

    Raises:
      ValueError: a shard is missing, or is not what the manifest says.
    """
    import grain

    self._layout = Layout(manifest["sequence_length"], manifest["vocab_size"])
    self.sequence_length = self._layout.sequence_length
    self._shards = [s for s in manifest["shards"] if s["split"] == split]
    self._folder = folder
    for shard in self._shards:
      self._check(folder / shard["file"], shard["bytes"])
    paths = [str(folder / shard["file"]) for shard in self._shards]
    self._source = _open(grain.sources.ArrayRecordDataSource, paths)
    found = len(self._source)
    self._count = sum(shard["rows"] for shard in self._shards)
    if found != self._count:
      raise ValueError(
        f"the shards of {folder} have {found} rows, its manifest "
        f"{self._count}; run experiments.prepare again: it repairs them"
      )

  def _check(self, path: pathlib.Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
      what = "missing" if found is None else f"{found} bytes, expected {size}"
      raise ValueError(
        f"the shard {path} is {what}; run experiments.prepare again: it "
        "repairs the folder"
      )

  def __len__(self) -> int:
    return self._count

  def take(self, index_B: np.ndarray) -> packing.Rows:
    """Some rows, [B,T] each.

    Raises:
      ValueError: a record is damaged.
    """
    if not len(index_B):
      return self._layout.rows([])
    try:
      records = self._source.__getitems__([int(i) for i in index_B])
    except (ValueError, RuntimeError):
      records = [self._record(int(i)) for i in index_B]
    return self._layout.rows(records)

  def _record(self, index: int) -> bytes:
    """One record alone, to know which of many is damaged."""
    ends = np.cumsum([shard["rows"] for shard in self._shards])
    shard = self._shards[int(np.searchsorted(ends, index, side="right"))]
    try:
      return self._source.__getitems__([index])[0]
    except (ValueError, RuntimeError) as error:
      raise _damaged(self._folder / shard["file"], error) from error


def _open(reader: Callable[[list[str]], Any], paths: list[str]) -> Any:
  """A reader of all files; of one that is damaged, an error."""
  try:
    return reader(paths)
  except (ValueError, RuntimeError) as error:
    if len(paths) == 1:
      raise _damaged(paths[0], error) from error
  for path in paths:
    _open(reader, [path])
  return reader(paths)


def _damaged(path: pathlib.Path | str, error: Exception) -> ValueError:
  return ValueError(
    f"the shard {path} is damaged ({error}); run experiments.prepare again: it "
    "repairs the folder"
  )


def read_manifest(path: str) -> dict[str, Any]:
  """The manifest of a prepared corpus.

  Raises:
    FileNotFoundError: no folder there.
    ValueError: no prepared corpus, or an unfinished one, or of another format.
  """
  folder = files.expand(path)
  if not path or not folder.is_dir():
    raise FileNotFoundError(
      f"no folder data.path={path!r}; data.source=prepared needs the --out of "
      "experiments.prepare"
    )
  file = folder / MANIFEST
  if not file.exists():
    raise ValueError(
      f"{folder} has no {MANIFEST}: no prepared corpus, or one that is not "
      "finished; run experiments.prepare --out on it"
    )
  manifest = files.read_json(file)
  if not isinstance(manifest, dict):
    raise ValueError(f"{file} is not a manifest; {PREPARE_AGAIN}")
  try:
    manifest = files.unsealed(manifest, str(file))
  except files.BrokenSealError as error:
    raise ValueError(
      f"{error}; run experiments.prepare again: it repairs the folder"
    ) from error
  found = manifest.get("format")
  formats.check(file, "a manifest", found, FORMAT, PREPARE_AGAIN)
  if wrong := errors.misfit(manifest, _SHAPE):
    raise ValueError(f"{file} is damaged at {wrong}; {PREPARE_AGAIN}")
  return manifest


def manifest_hash(manifest: Mapping[str, Any]) -> str:
  """SHA-256 (hex) of a manifest: the fingerprint of the corpus."""
  canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(canonical.encode()).hexdigest()


def check(
  manifest: Mapping[str, Any],
  *,
  sequence_length: int,
  alignment: int,
  tokenizer_fingerprint: str,
) -> None:
  """Raises ValueError where a run wants rows that the corpus does not have."""
  have = manifest["sequence_length"]
  if have != sequence_length:
    raise ValueError(
      f"the corpus was prepared for data.sequence_length={have}, got "
      f"{sequence_length}; set it to {have}, or prepare the corpus again"
    )
  if manifest["alignment"] % alignment:
    raise ValueError(
      f"the corpus was prepared for alignment {manifest['alignment']}, the "
      f"model needs a multiple of {alignment} (its memory chunks); prepare it "
      f"with --alignment={alignment}"
    )
  if manifest["tokenizer"]["fingerprint"] != tokenizer_fingerprint:
    raise ValueError(
      "data.tokenizer is not the one that the corpus was prepared with, "
      f"{manifest['tokenizer']['name']}; give that one, and data.bos and "
      "data.special_tokens as they were"
    )
