"""Sources of documents: where text comes from, and what is held out.

A source is its documents, already split into train and validation, and the
SHA-256 of their content; a run keeps the fingerprint, and refuses to continue
with other text. These make one: `embedded` (the library of one Python, which
travels with this package), `synthetic` (generated), and `files`, `array_record`
and `hugging_face` (the user's own). All hold their text in memory; what is too
large for that is prepared once (`prepared`).
"""

import dataclasses
import hashlib
import importlib.resources
import io
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np

from nl_jax import files as files_lib
from nl_jax.data import bad_documents as bad_lib
from nl_jax.data import documents as documents_lib
from nl_jax.data import errors, libraries

# Of the archive that experiments/prepare/embedded.py made. Without what some
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
  bad_documents: str = bad_lib.POLICIES[0],
  separator: str = "",
) -> Source:
  """The source of config fields data.source, data.path and so on.

  Args:
    name: one of `NAMES`.
    path: file or folder; must be empty for "embedded" and "synthetic".
    seed: makes the documents of "synthetic"; the others do not depend on it.
    text_key: field or column with the text, of jsonl, parquet and
      hugging_face.
    bad_documents: "refuse" what cannot be used, or "skip" it and say so.
    separator: between the documents of a file of "text"; "": each is one.

  Raises:
    ValueError: unknown name, a path that nothing reads, unusable text.
    FileNotFoundError: nothing at path.
  """
  if name not in NAMES:
    raise errors.unknown_name("data.source", name, NAMES)
  if separator and name != "text":
    raise no_separator(separator, name)
  bad = bad_lib.on_bad(bad_documents)
  if name in documents_lib.SUFFIXES:
    return _with_bad(files(path, name, text_key, bad, separator), bad)
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


def no_separator(separator: str, name: str) -> ValueError:
  """The error for a source whose documents no separator parts."""
  return ValueError(
    f"data.separator={separator!r} separates documents of data.source=text; "
    f"got data.source={name!r}"
  )


def _with_bad(source: Source, bad: bad_lib.OnBad) -> Source:
  """The source, which says what was left out of it."""
  if not isinstance(bad, bad_lib.Skipped):
    return source
  places = tuple(bad.places)
  return dataclasses.replace(source, bad=bad.count, bad_places=places)


def said_by(where: pathlib.Path) -> list[str]:
  """The sources that the ending of a file, or the files of a folder, say."""
  if where.is_dir() and any(
    (where / name).is_file() for name in libraries.FOLDER_MARKS
  ):
    return ["hugging_face"]
  is_said = {kind: documents_lib.is_of(kind) for kind in documents_lib.SUFFIXES}
  is_said["array_record"] = libraries.is_record
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
  bad: bad_lib.OnBad = bad_lib.refuse,
  separator: str = "",
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
    separator: as of `load`.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no path, no such files, no text in them, or unusable.
  """
  found = documents_lib.find(path, kind)
  named = [
    (name, body)
    for file in found.paths
    for name, body in documents_lib.read(
      found, file, text_key, bad=bad, separator=separator
    )
  ]
  if kind == "text" and not separator and files_lib.expand(path).is_file():
    named = [("", body) for _, body in named]  # Whatever the file is called.
  return _split(kind, path, named, bad)


def array_record(
  path: str, text_key: str = "text", bad: bad_lib.OnBad = bad_lib.refuse
) -> Source:
  """The source of `libraries.array_record`, split like files."""
  named = libraries.array_record(path, text_key, bad)
  return _split("array_record", path, named, bad)


def hugging_face(
  path: str, text_key: str = "text", bad: bad_lib.OnBad = bad_lib.refuse
) -> Source:
  """The source of `libraries.hugging_face`; without splits, split like files.

  Raises:
    ValueError: a split without text, and what is raised there.
  """
  named = libraries.hugging_face(path, text_key, bad)
  if len(named) == 1:
    return _split("hugging_face", path, named[0], bad)
  train, validation = named
  bodies = [tuple(body for _, body in x if body) for x in named]
  if not all(bodies):
    raise ValueError(
      f"data.path={path!r} has a split without text; give both some"
    )
  mark = [*train, ("", ""), *validation]
  mark_of = _fingerprint(mark)
  return Source("hugging_face", path, mark_of, bodies[0], bodies[1])


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
  bad: bad_lib.OnBad,
) -> Source:
  """A source of documents that come without a split."""
  named = [(name, body) for name, body in named if body]
  if not named and isinstance(bad, bad_lib.Skipped) and bad.count:
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
