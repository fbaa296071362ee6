"""Prepares a corpus: files to packed rows in shards, once, by many processes.

The input is cut into shards by its bytes alone (`partition`), so the shards are
the same whatever the number of workers and however often the work was stopped.
A worker streams the documents of a shard through the tokenizer and the packer
to an ArrayRecord file, and then leaves a note in `notes/`; a shard with a note
that holds is not done again. The manifest is written last, and goes before a
shard is made again: a shard that exists is complete.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from nl_jax import files, formats
from nl_jax.data import (
  bad_documents,
  documents,
  errors,
  packing,
  partition,
  prepared,
  sources,
)
from nl_jax.data import tokenizers as tokenizers_lib

PLAN = "plan.json"
_NOTES = "notes"
_NOTE = {
  "documents_sha256": str,
  "shards": [{**prepared.SHARD, "rows_sha256": str}],
  "counts": dict.fromkeys(sources.SPLITS, prepared.COUNTS),
  "opening": str,
}
_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BAD = "bad_documents"  # Of a note, a manifest and the settings.
_FLUSH_TOKENS = 2**18  # Documents are packed when they have so many.
_TELL_BYTES = 2**20
_OPENING = 2000  # Characters of a held-out document that the manifest keeps.


class Job(NamedTuple):
  """One shard to make.

  Attributes:
    number: of the shard.
    pieces: of its input.
    settings: of all.
    out: the folder.
  """

  number: int
  pieces: tuple[partition.Piece, ...]
  settings: partition.Settings
  out: str


def check(settings: partition.Settings) -> tokenizers_lib.Tokenizer:
  """The tokenizer; raises ValueError for settings that do not fit."""
  if settings.kind not in partition.KINDS:
    raise errors.unknown_name("data.source", settings.kind, partition.KINDS)
  packing.check_lengths(settings.sequence_length, settings.alignment)
  if settings.separator and settings.kind != "text":
    raise sources.no_separator(settings.separator, settings.kind)
  if not 0 < settings.validation_percent < 100:
    raise ValueError(
      "--validation_percent must be between 0 and 100, got "
      f"{settings.validation_percent}"
    )
  return _tokenizer(settings)


def _tokenizer(settings: partition.Settings) -> tokenizers_lib.Tokenizer:
  return tokenizers_lib.load(
    settings.tokenizer,
    bos=settings.bos,
    special_tokens=settings.special_tokens,
  )


def run_job(job: Job, advance: Callable[[int], None]) -> bool:
  """Makes a shard and its note, unless both are there.

  Args:
    job: the shard.
    advance: called with the bytes of input that are done, now and then.

  Returns:
    Whether it was made now.

  Raises:
    ValueError: unusable text.
    OSError: the disk is full, or gone.
  """
  out = pathlib.Path(job.out)
  if _holds(out, job, advance):
    advance(sum(piece.size for piece in job.pieces))
    return False
  (out / prepared.MANIFEST).unlink(missing_ok=True)
  tokenizer = _tokenizer(job.settings)
  writers = {
    split: _Writer(out, split, job, tokenizer) for split in sources.SPLITS
  }
  try:
    note = _write(job, writers, advance)
  finally:
    for writer in writers.values():
      writer.discard()
  _write_json(note_path(out, job.number), note)
  return True


def _write(
  job: Job,
  writers: Mapping[str, "_Writer"],
  advance: Callable[[int], None],
) -> dict[str, Any]:
  """Writes the rows of a shard; returns its note."""
  digest, bad = _Digest(), bad_documents.on_bad(job.settings.bad_documents)
  for piece in job.pieces:
    told = read = 0
    for document, split in partition.read(piece, job.settings, bad):
      size = digest.update(document)
      read += size
      if read - told > _TELL_BYTES and read <= piece.size:
        advance(read - told)
        told = read
      writers[split].add(document.text, size)
    advance(piece.size - told)
  return {
    **_left_out(bad, job.settings),
    "documents_sha256": digest.hexdigest(),
    "shards": [x for split in writers.values() for x in split.close()],
    "counts": {split: w.counts for split, w in writers.items()},
    "opening": writers["validation"].opening,
  }


def _left_out(
  bad: bad_documents.OnBad, settings: partition.Settings
) -> dict[str, Any]:
  """What a note says of bad documents; nothing where they are refused."""
  if not isinstance(bad, bad_documents.Skipped):
    return {}
  # Names as in the rest of the note: wherever the corpus lies.
  folder = f"{documents.root(settings.path)}/"
  places = [place.replace(folder, "") for place in bad.places]
  return {_BAD: {"count": bad.count, "places": places}}


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
    self._held: list[Any] = []
    self._tokens, self._writer = 0, cast(Any, None)
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
      files.create(self._temporary).close()
      # One record a group: rows are read alone.
      self._writer = array_record_module.ArrayRecordWriter(
        str(self._temporary), "group_size:1"
      )
    with _writing(self._path):
      for record in self._layout.records(rows):
        self._writer.write(record)
        self._digest.update(record)
    self.counts["tokens"] += int(np.count_nonzero(rows["segment_ids"]))
    self.counts["rows"] += len(rows["inputs"])

  @property
  def _temporary(self) -> pathlib.Path:
    return files.beside(self._path)

  def close(self) -> list[dict[str, Any]]:
    """What the manifest says of the file; [] where there are no rows."""
    self._push(self._packer.push(self._held))
    self._push(self._packer.flush())
    if self._writer is None:
      return []
    with _writing(self._path):
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

  def discard(self) -> None:
    """Frees the space of a file that was not finished."""
    self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """What the system, or the writer of records, says of a disk, as a sentence.

  Raises:
    OSError: instead of what was raised.
  """
  try:
    yield
  except (OSError, RuntimeError) as error:
    full = os.strerror(errno.ENOSPC)
    is_full = getattr(error, "errno", 0) in _FULL or full in str(error)
    reason, advice = (full, "free space and ") if is_full else (error, "")
    raise OSError(
      f"{path} cannot be written: {reason}; {advice}start the same command "
      "again: it resumes"
    ) from error


def _holds(out: pathlib.Path, job: Job, advance: Callable[[int], None]) -> bool:
  """Whether a shard is done and whole, and its input says what it said.

  Times say nothing: tar, rsync -a and cp -p bring older ones along.
  """
  try:
    note = read_note(note_path(out, job.number))
  except (FileNotFoundError, ValueError):
    return False
  is_whole = all(
    _rows_hash(out / shard["file"]) == shard["rows_sha256"]
    for shard in note["shards"]
  )
  if not is_whole:
    return False
  digest, bad = _Digest(), bad_documents.on_bad(job.settings.bad_documents)
  for piece in job.pieces:
    for document, _ in partition.read(piece, job.settings, bad):
      digest.update(document)
      advance(0)  # Where the command is stopped, it raises.
  return digest.hexdigest() == note["documents_sha256"]


def read_note(path: pathlib.Path) -> dict[str, Any]:
  """The note of a shard.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged.
  """
  note = files.read_json(path)
  if wrong := errors.misfit(note, _NOTE):
    raise ValueError(f"{path} is damaged at {wrong}")
  return note


class _Digest:
  """SHA-256 over the names and contents of documents."""

  def __init__(self):
    self._digest = hashlib.sha256()

  def update(self, document: documents.Document) -> int:
    """Takes the next document; returns its UTF-8 bytes."""
    content = document.text.encode("utf-8")
    self._digest.update(f"{document.name}\0{len(content)}\0".encode())
    self._digest.update(content)
    return len(content)

  def hexdigest(self) -> str:
    """The hash of all."""
    return self._digest.hexdigest()


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


def claim(
  settings: partition.Settings, tokenizer: tokenizers_lib.Tokenizer
) -> dict[str, Any]:
  """What an --out folder must agree on: settings, tokenizer, input files.

  Returns:
    A JSON object without a path of this machine.
  """
  files = documents.find(settings.path, settings.kind)
  values = settings._asdict()
  del values["path"]
  if settings.bad_documents == bad_documents.POLICIES[0]:
    del values[_BAD]  # As plans of before it say it.
  if not settings.separator:
    del values["separator"]
  for name in ("bos", "special_tokens"):  # Of the tokenizer's fingerprint.
    del values[name]
  values = {"source": values.pop("kind"), **values}
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
    _compare(out, _read_plan(path), about)
  # A command that was killed at once leaves a hidden file at most.
  elif out.exists() and any(p.name[0] != "." for p in out.iterdir()):
    raise ValueError(
      f"{out} is not empty and holds no preparation; give another --out"
    )
  with _writing(out):
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      _write_json(path, about)
    (out / _NOTES).mkdir(exist_ok=True)


def _compare(
  out: pathlib.Path, before: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
  keys = [k for k in {**before, **about} if before.get(k) != about.get(k)]
  shown = "; ".join(
    f"{key}: {_short(before.get(key))} -> {_short(about.get(key))}"
    for key in keys
  )
  if keys:
    raise ValueError(
      f"{out} holds another preparation ({shown}); give another --out or move "
      "it away"
    )


@contextlib.contextmanager
def lock(out: pathlib.Path) -> Iterator[None]:
  """Holds a folder for this process; the system frees it on any death.

  Raises:
    ValueError: another process prepares there.
  """
  with contextlib.ExitStack() as stack:
    try:
      with _writing(out / _LOCK):
        stack.enter_context(files.lock(out / _LOCK))
    except files.HeldError as error:
      raise ValueError(
        f"another process is preparing {out}; wait for it or stop it"
      ) from error
    yield


def _read_plan(path: pathlib.Path) -> dict[str, Any]:
  try:
    plan = files.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error}; give another --out") from error
  if not isinstance(plan, dict):
    raise ValueError(f"{path} is damaged; give another --out")
  formats.check(
    path, "a plan", plan.get("format"), prepared.FORMAT, prepared.PREPARE_AGAIN
  )
  return plan


def finish(
  out: pathlib.Path,
  settings: partition.Settings,
  about: Mapping[str, Any],
  tokenizer: tokenizers_lib.Tokenizer,
  shards: int,
) -> dict[str, Any]:
  """Writes and returns the manifest, once all notes are there.

  Raises:
    ValueError: a split has no rows.
  """
  notes = [read_note(note_path(out, i)) for i in range(shards)]
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
        f"no text fell to {split} with --validation_percent="
        f"{settings.validation_percent:g}; give more text or another share"
      )
  left_out = [note[_BAD] for note in notes if _BAD in note]
  if left_out:
    places = [place for bad in left_out for place in bad["places"]]
    count = sum(bad["count"] for bad in left_out)
    about = {**about, _BAD: {"count": count, "places": places[:3]}}
  manifest = {
    **about,
    "vocab_size": tokenizer.vocab_size,
    "documents_sha256": [note["documents_sha256"] for note in notes],
    "shards": [shard for note in notes for shard in note["shards"]],
    "counts": counts,
    "opening": next(note["opening"] for note in notes if note["opening"]),
  }
  _write_json(out / prepared.MANIFEST, files.sealed(manifest))
  return manifest


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:57] + "..."


def note_path(out: pathlib.Path, number: int) -> pathlib.Path:
  """Of the note of a shard."""
  return out / _NOTES / f"{number:05d}.json"


def _write_json(path: pathlib.Path, value: Any) -> None:
  """As a whole or not at all."""
  with _writing(path):
    files.write(path, json.dumps(value, indent=1) + "\n")
