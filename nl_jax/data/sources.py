"""Sources of documents: where text comes from, and what is held out.

A source is its documents, already split into train and validation, and the
SHA-256 of their content; a run keeps the fingerprint, and refuses to go on with
other text. These make one: `embedded` (the library of one Python, which travels
with this package), `synthetic` (generated), and `files`, `array_record` and
`hugging_face` (the user's own). All hold their text in memory; what is too
large for that is prepared once (`prepared`).
"""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import io
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from nl_jax import files as files_lib
from nl_jax.data import documents as documents_lib
from nl_jax.data import errors, examples, prepared

# Of the archive that experiments/_embedded.py made. Without what some
# distributions ship apart (curses, dbm, distutils, ensurepip, lib2to3, sqlite3,
# tkinter, venv), and without tables (encodings, pydoc_data).
EMBEDDED_SHA256 = (
  "6e1ec9b3ddf2514d8ac48c3df5e98326a28869063f0296a4763fab36fbef44d9"
)
EMBEDDED_PACKAGES = (
  "asyncio",
  "collections",
  "concurrent",
  "ctypes",
  "email",
  "html",
  "http",
  "importlib",
  "json",
  "logging",
  "multiprocessing",
  "re",
  "tomllib",
  "unittest",
  "urllib",
  "wsgiref",
  "xml",
  "xmlrpc",
  "zoneinfo",
)
EMBEDDED_VALIDATION_PERCENT = 8
VALIDATION_PERCENT = 10
MIN_DOCUMENTS_TO_SPLIT_BY_NAME = 10
SYNTHETIC_DOCUMENTS = 1024  # About 0.5 MB.
SYNTHETIC_LENGTH = 512  # Characters of the longest document.
# Of what save_to_disk wrote.
_FOLDER_MARKS = ("dataset_dict.json", "dataset_info.json")
WITHOUT_PATH = ("embedded", "synthetic")
SPLITS = ("train", "validation")
NAMES = (
  "embedded",
  "synthetic",
  *documents_lib.SUFFIXES,
  "array_record",
  "hugging_face",
)


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents with a fixed split.

  Attributes:
    name: the key of `load`.
    origin: where the text is from, in words.
    fingerprint: SHA-256 (hex) over paths and content of both splits.
    train: documents to learn from, in a fixed order; () of a corpus that was
      prepared.
    validation: documents held out, in a fixed order; of a corpus that was
      prepared, the beginning of one.
    bad: documents that were left out since they cannot be used.
    bad_places: what is wrong with the first three of them.
  """

  name: str
  origin: str
  fingerprint: str
  train: tuple[str, ...] = dataclasses.field(repr=False)
  validation: tuple[str, ...] = dataclasses.field(repr=False)
  bad: int = 0
  bad_places: tuple[str, ...] = ()

  def documents(self, split: str) -> tuple[str, ...]:
    """The documents of "train" or "validation"."""
    if split not in SPLITS:
      raise errors.unknown_name("split", split, SPLITS)
    return self.train if split == "train" else self.validation

  def describe(self) -> str:
    """One line for logs: name, origin, sizes, start of the fingerprint."""
    sizes = "".join(
      f"{split} {len(self.documents(split))} documents"
      f" {sum(map(len, self.documents(split))):,} characters, "
      for split in SPLITS
      if self.train
    )
    if self.bad:
      sizes += f"left out {self.bad:,} bad documents: "
      sizes += "".join(f"{place}; " for place in self.bad_places)
    return f"{self.name} ({self.origin}): {sizes}{self.fingerprint[:12]}"


def load(
  name: str,
  path: str = "",
  seed: int = 0,
  text_key: str = "text",
  bad_documents: str = documents_lib.POLICIES[0],
) -> Source:
  """The source of config fields data.source, data.path and so on.

  Args:
    name: one of `NAMES`.
    path: file or folder; must be empty for "embedded" and "synthetic".
    seed: makes the documents of "synthetic"; the others do not depend on it.
    text_key: field or column with the text, of jsonl, parquet and
      hugging_face.
    bad_documents: "refuse" what cannot be used, or "skip" it and say so.

  Raises:
    ValueError: unknown name, a path that nothing reads, unusable text.
    FileNotFoundError: nothing at path.
  """
  if name not in NAMES:
    raise errors.unknown_name("data.source", name, NAMES)
  bad = documents_lib.on_bad(bad_documents)
  if name in documents_lib.SUFFIXES:
    return _with_bad(files(path, name, text_key, bad), bad)
  if name == "array_record":
    return _with_bad(array_record(path, text_key, bad), bad)
  if name == "hugging_face":
    return _with_bad(hugging_face(path, text_key, bad), bad)
  if path:
    raise ValueError(
      f"data.path={path!r} is not read by data.source={name!r}; leave it "
      "empty, or set data.source=text"
    )
  return embedded() if name == "embedded" else synthetic(seed)


def _with_bad(source: Source, bad: documents_lib.OnBad) -> Source:
  """The source, which says what was left out of it."""
  if not isinstance(bad, documents_lib.Skipped):
    return source
  places = tuple(bad.places)
  return dataclasses.replace(source, bad=bad.count, bad_places=places)


def said_by(where: pathlib.Path) -> list[str]:
  """The sources that the ending of a file, or the files of a folder, say."""
  if where.is_dir() and any((where / name).is_file() for name in _FOLDER_MARKS):
    return ["hugging_face"]
  is_said = {kind: documents_lib.is_of(kind) for kind in documents_lib.SUFFIXES}
  is_said["array_record"] = _is_record
  if where.is_dir():
    return [k for k, of in is_said.items() if documents_lib.below(where, of)]
  return [kind for kind, of in is_said.items() if of(where.name)]


def embedded(packages: Iterable[str] = EMBEDDED_PACKAGES) -> Source:
  """The Python sources of CPython 3.11.7's library, tests excepted.

  They travel with this package, so that a figure is of the same text under
  every Python; their licence is beside them.

  Args:
    packages: some of `EMBEDDED_PACKAGES`.

  Raises:
    ValueError: no such package, or the archive is not the one of this version.
  """
  packages = set(packages)
  for package in packages.difference(EMBEDDED_PACKAGES):
    raise errors.unknown_name("package", package, EMBEDDED_PACKAGES)
  archive = zipfile.ZipFile(io.BytesIO(_embedded_archive()))
  named = [
    (name, archive.read(name).decode("utf-8"))
    for name in sorted(archive.namelist())
    if name.partition("/")[0] in packages
  ]
  train, validation = _split_by_path(named, EMBEDDED_VALIDATION_PERCENT)
  origin = "Python 3.11 standard library"
  return Source("embedded", origin, _fingerprint(named), train, validation)


def _embedded_archive() -> bytes:
  """The archive of the embedded corpus, checked."""
  folder = importlib.resources.files("nl_jax.data")
  path = folder / "embedded" / "corpus.zip"
  content = path.read_bytes() if path.is_file() else b""
  found = hashlib.sha256(content).hexdigest()
  if found != EMBEDDED_SHA256:
    what = f"has the SHA-256 {found[:12]}" if content else "is missing"
    raise ValueError(
      f"the embedded corpus {path} {what}, expected {EMBEDDED_SHA256[:12]}; "
      "install nl_jax again, or set data.source=text and data.path"
    )
  return content


def files(
  path: str,
  kind: str,
  text_key: str = "text",
  bad: documents_lib.OnBad = documents_lib.refuse,
) -> Source:
  """A file, or those of a folder and its sub-folders.

  A text file is one document, jsonl and parquet have one a line or row. At
  least ten documents are split by a hash of their names; of fewer, the last
  tenth of each, cut at a line edge, is validation.

  Args:
    path: file or folder.
    kind: "text", "jsonl" or "parquet".
    text_key: field or column with the text.
    bad: takes the documents that cannot be used.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no path, no such files, no text in them, or unusable.
  """
  found = documents_lib.find(path, kind)
  named = [
    tuple(document)
    for file in found.paths
    for document in documents_lib.read(found, file, text_key, bad=bad)
  ]
  if kind == "text" and files_lib.expand(path).is_file():
    named = [("", body) for _, body in named]  # Whatever the file is called.
  return _split(kind, path, named, bad)


def array_record(
  path: str,
  text_key: str = "text",
  bad: documents_lib.OnBad = documents_lib.refuse,
) -> Source:
  """ArrayRecord files: one, or those of a folder.

  Args:
    path: file or folder.
    text_key: the feature with the text, where a record is a
      `tf.train.Example`; any other record is UTF-8 text.
    bad: takes the documents that cannot be used.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no such files, or no text in them, or unusable.
  """
  import grain

  where = files_lib.expand(path)
  if not path or not where.exists():
    raise FileNotFoundError(
      f"nothing at data.path={path!r}; data.source=array_record needs an "
      "ArrayRecord file or a folder with .array_record files"
    )
  if not where.is_dir():
    documents_lib.require_file(where)
    found = [where]
  else:
    found = documents_lib.below(where, _is_record)
  if not found:
    raise ValueError(f"no .array_record file in the folder data.path={path!r}")
  if (found[0].parent / prepared.MANIFEST).exists():
    raise ValueError(
      f"data.path={path!r} holds prepared rows, not text; set "
      f"data.source=prepared and data.path={str(found[0].parent)!r}"
    )
  named = []
  for file in found:
    try:
      records = grain.sources.ArrayRecordDataSource([str(file)])
      contents = [records[i] for i in range(len(records))]
    except (ValueError, RuntimeError, IndexError) as error:
      raise ValueError(
        f"{file} is no ArrayRecord file, or a damaged one ({error})"
      ) from error
    for i, content in enumerate(contents):
      try:
        text = _record(content, f"{file}, record {i}", text_key)
      except documents_lib.BadDocumentError as error:
        bad(error)
      else:
        named.append((f"{file.name}:{i}", text))
  return _split("array_record", path, named, bad)


def _is_record(name: str) -> bool:
  return ".array_record" in name.lower()


def _record(content: bytes, where: str, key: str) -> str:
  """The text of a record."""
  features = examples.features(content)
  if features is None:
    return documents_lib.decode(content, where)
  if key not in features:
    raise documents_lib.BadDocumentError(
      f"{where} is a tf.train.Example without a feature {key!r} (it has: "
      f"{', '.join(features)}); set data.text_key"
    )
  chosen = features[key]
  if chosen.kind != "bytes" or len(chosen.values) != 1:
    raise documents_lib.BadDocumentError(
      f"{where}: the feature {key!r} holds {len(chosen.values)} texts "
      f"({chosen.kind}), expected one; set data.text_key"
    )
  return documents_lib.decode(chosen.values[0], f"{where}, {key!r}")


def hugging_face(
  path: str,
  text_key: str = "text",
  bad: documents_lib.OnBad = documents_lib.refuse,
) -> Source:
  """A folder that Hugging Face `datasets` wrote with `save_to_disk`.

  Of a DatasetDict, "validation" (or else "test") is held out; a Dataset alone
  is split like files.

  Args:
    path: the folder.
    text_key: the column with the text.
    bad: takes the documents that cannot be used.

  Raises:
    ModuleNotFoundError: `datasets` is not installed.
    FileNotFoundError: nothing there.
    ValueError: no such folder, or no such column.
  """
  where = files_lib.expand(path)
  if not path or not where.is_dir():
    raise FileNotFoundError(
      f"no folder data.path={path!r}; data.source=hugging_face needs a folder "
      "that save_to_disk of the library datasets wrote"
    )
  import datasets

  with _folder_errors(path, "is no folder of save_to_disk, or a damaged one"):
    loaded = datasets.load_from_disk(str(where))
  if not isinstance(loaded, datasets.DatasetDict):
    named = _column(loaded, path, text_key, bad)
    return _split("hugging_face", path, named, bad)
  held_out = [x for x in ("validation", "test") if x in loaded]
  if "train" not in loaded or not held_out:
    raise ValueError(
      f"data.path={path!r} has the splits {', '.join(loaded)}; it needs train "
      "and validation or test"
    )
  train = _column(loaded["train"], path, text_key, bad)
  validation = _column(loaded[held_out[0]], path, text_key, bad)
  bodies = [tuple(body for _, body in x if body) for x in (train, validation)]
  if not all(bodies):
    raise ValueError(
      f"data.path={path!r} has a split without text; give both some"
    )
  mark = [*train, ("", ""), *validation]
  return Source("hugging_face", path, _fingerprint(mark), *bodies)


def _column(
  rows: Any, path: str, key: str, bad: documents_lib.OnBad
) -> list[tuple[str, str]]:
  if key not in rows.column_names:
    raise ValueError(
      f"data.path={path!r} has no column {key!r} (it has: "
      f"{', '.join(rows.column_names)}); set data.text_key"
    )
  with _folder_errors(path, f"is damaged in column {key!r}"):
    # Of the offsets and the text, which nothing else looks at.
    rows.data.column(key).validate(full=True)
    bodies = list(rows[key])
  named = []
  for i, body in enumerate(bodies):
    where = lambda i=i: f"data.path={path!r}, row {i}"
    try:
      named.append((str(i), documents_lib.string(body, key, where)))
    except documents_lib.BadDocumentError as error:
      bad(error)
  return named


@contextlib.contextmanager
def _folder_errors(path: str, what: str) -> Iterator[None]:
  """What the library raises for a folder, as a ValueError that names it."""
  import pyarrow

  known = (pyarrow.ArrowException, OSError, ValueError, LookupError)
  try:
    yield
  except (*known, AttributeError, TypeError, RecursionError) as error:
    reason = " ".join(str(error).split())
    raise ValueError(
      f"data.path={path!r} {what} ({type(error).__name__}: {reason}); save it "
      "again, or give another"
    ) from error


def synthetic(seed: int = 0, documents: int = SYNTHETIC_DOCUMENTS) -> Source:
  """Generated documents: a random word repeated, or random lines copied.

  Both can only be predicted by reading back, so a memory helps; nothing needs
  a file or the network.

  Args:
    seed: makes the documents.
    documents: their number, at least 2; 1/16 are validation, at least one.
  """
  if documents < 2:
    raise ValueError(f"a split needs at least 2 documents, got {documents}")
  rng = np.random.default_rng(seed)
  named = [
    (f"{i:06d}", _synthetic_document(rng, copy=i % 2 == 1))
    for i in range(documents)
  ]
  held_out = max(1, documents // 16)
  bodies = tuple(body for _, body in named)
  return Source(
    "synthetic",
    f"repetition and copying, seed {seed}",
    _fingerprint(named),
    bodies[held_out:],
    bodies[:held_out],
  )


def in_validation(path: str, percent: float) -> bool:
  """Whether a document is held out, from the SHA-256 of its relative path."""
  number = _path_hash(path)
  return number % 100 + number // 100 % 100 / 100 < percent


def _path_hash(path: str) -> int:
  return int(hashlib.sha256(path.encode("utf-8")).hexdigest()[:8], 16)


def _fingerprint(named: Iterable[tuple[str, str]]) -> str:
  digest = hashlib.sha256()
  for name, body in named:
    content = body.encode("utf-8")
    # The lengths keep two different lists from having the same bytes.
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)
  return digest.hexdigest()


def _split(
  kind: str,
  path: str,
  named: list[tuple[str, str]],
  bad: documents_lib.OnBad,
) -> Source:
  """A source of documents that come without a split."""
  named = [(name, body) for name, body in named if body]
  if not named and isinstance(bad, documents_lib.Skipped) and bad.count:
    raise ValueError(
      f"all {bad.count:,} documents of data.path={path!r} are bad, the first: "
      f"{bad.places[0]}"
    )
  if not named:
    raise ValueError(f"data.path={path!r} is empty; give files with text")
  if len(named) >= MIN_DOCUMENTS_TO_SPLIT_BY_NAME:
    train, validation = _split_by_path(named, VALIDATION_PERCENT)
  else:
    train, validation = _split_tails(named, path)
  return Source(kind, str(path), _fingerprint(named), train, validation)


def held_out(names: Iterable[str], percent: float) -> set[str]:
  """The names that a hash holds out: about so many percent, at least one."""
  names = list(names)
  chosen = {name for name in names if in_validation(name, percent)}
  return chosen | {min(names, key=_path_hash)}


def _split_by_path(
  named: list[tuple[str, str]], percent: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Splits documents by a hash of their names; at least one is held out."""
  chosen = held_out((name for name, _ in named), percent)
  return (
    tuple(body for name, body in named if name not in chosen),
    tuple(body for name, body in named if name in chosen),
  )


def _split_tails(
  named: list[tuple[str, str]], path: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Cuts the last tenth off each document, for validation."""
  cuts = [(body, cut(body)) for _, body in named]
  train = tuple(body[:cut] for body, cut in cuts)
  validation = tuple(body[cut:] for body, cut in cuts if cut < len(body))
  if not validation:
    raise ValueError(
      f"data.path={path!r} has too little text to hold any of it out; give at "
      "least two characters"
    )
  return train, validation


def cut(body: str, percent: float = VALIDATION_PERCENT) -> int:
  """Where validation starts: the line edge nearest to nine tenths of body.

  Args:
    body: the text.
    percent: of it, held out.
  """
  goal = len(body) - int(len(body) * percent / 100)
  goal = min(goal, max(1, len(body) - 1))
  after = body.find("\n", goal - 1) + 1
  before = body.rfind("\n", 0, goal - 1) + 1
  edges = [edge for edge in (after, before) if 0 < edge < len(body)]
  # A text of one line is cut within it.
  return min(edges, key=lambda edge: abs(edge - goal), default=goal)


def _synthetic_document(rng: np.random.Generator, copy: bool) -> str:
  letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)

  def word(low: int, high: int) -> str:
    return rng.choice(letters, rng.integers(low, high)).tobytes().decode()

  length = int(rng.integers(SYNTHETIC_LENGTH // 2, SYNTHETIC_LENGTH + 1))
  if not copy:
    pattern = word(4, 17) + " "
    return (pattern * (length // len(pattern) + 1))[:length]
  lines = ""
  while len(lines) < length:
    first = word(8, 33)
    lines += f"{first}={first}\n"
  return lines[:length]
