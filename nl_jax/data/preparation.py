"""Prepares a corpus: files to packed rows in shards, once, by many processes.

The input is cut into shards by its bytes alone, so the shards are the same
whatever the number of workers and however often the work was stopped. A worker
streams the documents of a shard through the tokenizer and the packer to an
ArrayRecord file, and then leaves a note in `notes/`; a shard with a note that
holds is not done again. The manifest is written last.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from nl_jax.data import documents, errors, packing, prepared, sources
from nl_jax.data import tokenizers as tokenizers_lib

PLAN = "plan.json"
_NOTES = "notes"
_FLUSH_TOKENS = 2**18  # Documents are packed when they have so many.
_TELL_BYTES = 2**20
_PERCENT = 10_000  # Names are hashed to hundredths of a percent.
_OPENING = 2000  # Characters of a held-out document that the manifest keeps.


class Settings(NamedTuple):
  """What decides the shards.

  Attributes:
    kind: of the files: a key of `documents.SUFFIXES`.
    path: file or folder.
    tokenizer: "bytes" or a path.
    sequence_length: T.
    alignment: documents start at its multiples.
    text_key: field or column with the text.
    validation_percent: of the documents, held out.
    shard_bytes: of input in a shard, about.
    document_bytes: a longer text file is cut into documents at line edges.
  """

  kind: str
  path: str
  tokenizer: str
  sequence_length: int
  alignment: int
  text_key: str = "text"
  validation_percent: float = 10.0
  shard_bytes: int = 2**26
  document_bytes: int = 2**22


class Piece(NamedTuple):
  """A part of a file.

  Attributes:
    file: its number.
    start, stop: bytes, or row groups of parquet; stop None: to the end.
    size: bytes.
    split: that it belongs to; "" where each document has its own.
  """

  file: int
  start: int
  stop: int | None
  size: int
  split: str = ""


class Job(NamedTuple):
  """One shard to make.

  Attributes:
    number: of the shard.
    pieces: of its input.
    settings: of all.
    out: the folder.
  """

  number: int
  pieces: tuple[Piece, ...]
  settings: Settings
  out: str


def check(settings: Settings) -> tokenizers_lib.Tokenizer:
  """The tokenizer; raises ValueError for settings that do not fit."""
  if settings.kind not in documents.SUFFIXES:
    raise errors.unknown_name("source", settings.kind, documents.SUFFIXES)
  packing.check_lengths(settings.sequence_length, settings.alignment)
  if not 0 < settings.validation_percent < 100:
    raise ValueError(
      "validation_percent must be between 0 and 100, got "
      f"{settings.validation_percent}"
    )
  return tokenizers_lib.load(settings.tokenizer)


def plan(settings: Settings) -> list[tuple[Piece, ...]]:
  """The input of each shard, by the sizes and line edges of the files alone."""
  files = documents.find(settings.path, settings.kind)
  pieces = list(_pieces(files, settings))
  if not sum(piece.size for piece in pieces):
    raise ValueError(f"{settings.path!r} is empty; give files with text")
  shards, held, size = [], [], 0
  for piece in pieces:
    held.append(piece)
    size += piece.size
    if size >= settings.shard_bytes:
      shards.append(tuple(held))
      held, size = [], 0
  return [*shards, tuple(held)] if held else shards


def _pieces(files: documents.Files, settings: Settings) -> Iterator[Piece]:
  splits = _text_splits(files) if files.kind == "text" else {}
  for number, path in enumerate(files.paths):
    if files.kind == "parquet":
      groups = documents.row_groups(path, settings.text_key)
      for i, (_, size) in enumerate(groups):
        yield Piece(number, i, i + 1, size)
      continue
    size = path.stat().st_size
    if documents.compressed(path):
      yield Piece(number, 0, None, size)
      continue
    for start, stop, split in splits.get(number, [(0, size, "")]):
      is_text = files.kind == "text"
      limit = settings.document_bytes if is_text else settings.shard_bytes
      for low, high in _cut(path, start, stop, limit):
        yield Piece(number, low, high, high - low, split)


def _text_splits(
  files: documents.Files,
) -> dict[int, list[tuple[int, int, str]]]:
  """(start, stop, split) of the parts of each text file.

  Many files are split by their names, of few the last tenth is held out, as in
  `sources.files`.
  """
  sizes = [path.stat().st_size for path in files.paths]
  if len(sizes) >= sources.MIN_DOCUMENTS_TO_SPLIT_BY_NAME:
    names = [files.name(path) for path in files.paths]
    held_out = sources.held_out(names, sources.VALIDATION_PERCENT)
    return {
      i: [(0, size, "validation" if names[i] in held_out else "train")]
      for i, size in enumerate(sizes)
    }
  parts = {}
  for i, (path, size) in enumerate(zip(files.paths, sizes)):
    goal = size - size * sources.VALIDATION_PERCENT // 100
    edge = _line_edge(path, goal, size)
    parts[i] = [(0, edge, "train"), (edge, size, "validation")]
  return parts


def _cut(
  path: pathlib.Path, start: int, stop: int, limit: int
) -> Iterator[tuple[int, int]]:
  """Ranges of at most about `limit` bytes, cut behind line ends."""
  while start < stop:
    edge = stop
    if stop - start > limit:
      edge = min(_line_edge(path, start + limit, stop), stop)
    yield start, edge
    start = edge


def _line_edge(path: pathlib.Path, goal: int, stop: int) -> int:
  """The first line edge at or behind a byte; `stop` where there is none."""
  with path.open("rb") as file:
    file.seek(max(goal - 1, 0))
    file.readline()
    return min(file.tell(), stop)


def run_job(job: Job, advance: Callable[[int], None]) -> bool:
  """Makes a shard and its note, unless both are there.

  Args:
    job: the shard.
    advance: told the bytes of input that are done, every now and then.

  Returns:
    Whether it was made now.

  Raises:
    ValueError: unusable text.
    OSError: the disk is full, or gone.
  """
  out = pathlib.Path(job.out)
  files = documents.find(job.settings.path, job.settings.kind)
  if _holds(out, job, files):
    advance(sum(piece.size for piece in job.pieces))
    return False
  tokenizer = tokenizers_lib.load(job.settings.tokenizer)
  writers = {
    split: _Writer(out, split, job, tokenizer) for split in sources.SPLITS
  }
  digest = hashlib.sha256()
  for piece in job.pieces:
    told = read = 0
    for document in _documents(files, piece, job.settings):
      content = document.text.encode("utf-8")
      read += len(content)
      if read - told > _TELL_BYTES and read <= piece.size:
        advance(read - told)
        told = read
      digest.update(f"{document.name}\0{len(content)}\0".encode())
      digest.update(content)
      split = piece.split or _split_of(document.name, job.settings)
      writers[split].add(document.text, len(content))
    advance(piece.size - told)
  note = {
    "documents_sha256": digest.hexdigest(),
    "shards": [x for split in writers.values() for x in split.close()],
    "counts": {split: w.counts for split, w in writers.items()},
    "opening": writers["validation"].opening,
  }
  _write_json(_note(out, job.number), note)
  return True


def _documents(
  files: documents.Files, piece: Piece, settings: Settings
) -> Iterator[documents.Document]:
  path = files.paths[piece.file]
  return documents.read(files, path, settings.text_key, piece.start, piece.stop)


def _split_of(name: str, settings: Settings) -> str:
  share = zlib.crc32(name.encode("utf-8")) % _PERCENT
  held_out = share < settings.validation_percent * _PERCENT / 100
  return "validation" if held_out else "train"


class _Writer:
  """The rows of one split of a shard."""

  def __init__(
    self,
    out: pathlib.Path,
    split: str,
    job: Job,
    tokenizer: tokenizers_lib.Tokenizer,
  ):
    settings = job.settings
    self._split, self._tokenizer = split, tokenizer
    self._path = out / f"{split}-{job.number:05d}.array_record"
    self._packer = packing.Packer(
      settings.sequence_length, settings.alignment, tokenizer.pad_id
    )
    self._layout = prepared.Layout(
      settings.sequence_length, tokenizer.vocab_size
    )
    self._held, self._tokens, self._writer = [], 0, None
    self._rows = 0
    self._digest = hashlib.sha256()
    self.counts = {"documents": 0, "bytes": 0, "tokens": 0, "rows": 0}
    self.opening = ""

  def add(self, text: str, size: int) -> None:
    """A document, and its UTF-8 bytes."""
    self._held += packing.tokenize([text], self._tokenizer)
    self._tokens += len(self._held[-1])
    self.counts["documents"] += 1
    self.counts["bytes"] += size
    self.opening = self.opening or text[:_OPENING]
    if self._tokens >= _FLUSH_TOKENS:
      self._push(self._packer.push(self._held))
      self._held, self._tokens = [], 0

  def _push(self, rows: packing.Rows) -> None:
    from array_record.python import array_record_module

    if self._writer is None and len(rows["inputs"]):
      # One record a group: rows are read alone.
      self._writer = array_record_module.ArrayRecordWriter(
        str(self._temporary), "group_size:1"
      )
    with self._told():
      for record in self._layout.records(rows):
        self._writer.write(record)
        self._digest.update(record)
    self.counts["tokens"] += int(np.count_nonzero(rows["segment_ids"]))
    self.counts["rows"] += len(rows["inputs"])

  @property
  def _temporary(self) -> pathlib.Path:
    return self._path.with_name(f".{self._path.name}.tmp")

  def close(self) -> list[dict[str, Any]]:
    """What the manifest says of the file; [] where there are no rows."""
    self._push(self._packer.push(self._held))
    self._push(self._packer.flush())
    if self._writer is None:
      return []
    with self._told():
      self._writer.close()
    with self._temporary.open("rb+") as file:
      os.fsync(file.fileno())
    size = self._temporary.stat().st_size
    self._temporary.replace(self._path)
    return [
      {
        "file": self._path.name,
        "split": self._split,
        "rows": self.counts["rows"],
        "bytes": size,
        "rows_sha256": self._digest.hexdigest(),
      }
    ]

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """What the writer says of a full disk, as a sentence."""
    try:
      yield
    except RuntimeError as error:
      full = "No space left on device"
      reason = full if full in str(error) else error
      raise OSError(
        f"{self._path} cannot be written: {reason}; free space and start the "
        "same command again: it goes on"
      ) from error


def _holds(out: pathlib.Path, job: Job, files: documents.Files) -> bool:
  """Whether a shard is done, whole, and younger than its input."""
  path = _note(out, job.number)
  try:
    note = json.loads(path.read_text(encoding="utf-8"))
  except (FileNotFoundError, json.JSONDecodeError):
    return False
  made = path.stat().st_mtime_ns
  if any(files.paths[p.file].stat().st_mtime_ns > made for p in job.pieces):
    return False
  return all(
    _rows_hash(out / shard["file"]) == shard["rows_sha256"]
    for shard in note["shards"]
  )


def _rows_hash(path: pathlib.Path) -> str:
  """SHA-256 (hex) of the records of a file; "" where it cannot be read."""
  from array_record.python import array_record_module

  digest = hashlib.sha256()
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    for i in range(0, reader.num_records(), 1024):
      stop = min(i + 1024, reader.num_records())
      for record in reader.read(i, stop):
        digest.update(record)
    reader.close()
  except (RuntimeError, ValueError, IndexError, OSError):
    return ""
  return digest.hexdigest()


def claim(settings: Settings, tokenizer: tokenizers_lib.Tokenizer) -> dict:
  """What an --out folder must agree on: settings, tokenizer, input files.

  Returns:
    A JSON object without a path of this machine.
  """
  files = documents.find(settings.path, settings.kind)
  values = settings._asdict()
  del values["path"]
  values["tokenizer"] = {
    "name": pathlib.Path(tokenizer.name).name,
    "fingerprint": tokenizer.fingerprint,
  }
  names = {files.name(path): path.stat().st_size for path in files.paths}
  return {"format": prepared.FORMAT, **values, "files": names}


def open_folder(out: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Makes the folder, or finds that it is of the same preparation.

  Raises:
    ValueError: it holds something else.
  """
  path = out / PLAN
  if path.exists():
    before = json.loads(path.read_text(encoding="utf-8"))
    if before == about:
      return
    keys = [k for k in {**before, **about} if before.get(k) != about.get(k)]
    shown = "; ".join(
      f"{key}: {_short(before.get(key))} -> {_short(about.get(key))}"
      for key in keys
    )
    raise ValueError(
      f"{out} holds another preparation ({shown}); give another --out or move "
      "it away"
    )
  if out.exists() and any(out.iterdir()):
    raise ValueError(
      f"{out} is not empty and holds no preparation; give another --out"
    )
  (out / _NOTES).mkdir(parents=True, exist_ok=True)
  _write_json(path, about)


def finish(
  out: pathlib.Path,
  settings: Settings,
  about: Mapping[str, Any],
  tokenizer: tokenizers_lib.Tokenizer,
  shards: int,
) -> dict[str, Any]:
  """Writes and returns the manifest, once all notes are there.

  Raises:
    ValueError: a split has no rows.
  """
  notes = [
    json.loads(_note(out, i).read_text(encoding="utf-8")) for i in range(shards)
  ]
  counts = {
    split: {
      key: sum(note["counts"][split][key] for note in notes)
      for key in ("documents", "bytes", "tokens", "rows")
    }
    for split in sources.SPLITS
  }
  for split in sources.SPLITS:
    if not counts[split]["rows"]:
      raise ValueError(
        f"no document fell to {split} with --validation_percent="
        f"{settings.validation_percent}; give more documents or another share"
      )
  manifest = {
    **about,
    "vocab_size": tokenizer.vocab_size,
    "documents_sha256": [note["documents_sha256"] for note in notes],
    "shards": [shard for note in notes for shard in note["shards"]],
    "counts": counts,
    "opening": next(note["opening"] for note in notes if note["opening"]),
  }
  _write_json(out / prepared.MANIFEST, manifest)
  return manifest


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _note(out: pathlib.Path, number: int) -> pathlib.Path:
  return out / _NOTES / f"{number:05d}.json"


def _write_json(path: pathlib.Path, value: Any) -> None:
  """As a whole or not at all."""
  temporary = path.with_name(f".{path.name}.tmp")
  with temporary.open("w", encoding="utf-8") as file:
    file.write(json.dumps(value, indent=1) + "\n")
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
