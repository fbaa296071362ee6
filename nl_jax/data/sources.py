"""Sources of documents: where text comes from, and what is held out.

A source is its documents, already split into train and validation, and the
SHA-256 of their content; a run keeps the fingerprint, and refuses to go on with
other text. Three functions make one: `embedded` (standard-library Python, no
download), `text` (files), `synthetic` (generated). All hold their text in
memory.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterable

import numpy as np

from nl_jax.data import errors

# Packages of every CPython 3.11-3.13, in every distribution's base install;
# without those that some ship apart (curses, dbm, distutils, ensurepip,
# lib2to3, sqlite3, tkinter, venv) and tables (encodings, pydoc_data).
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
TEXT_VALIDATION_PERCENT = 10
TEXT_MIN_FILES_TO_SPLIT_BY_PATH = 10
SYNTHETIC_DOCUMENTS = 1024  # About 0.5 MB.
SYNTHETIC_LENGTH = 512  # Characters of the longest document.
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents with a fixed split.

  Attributes:
    name: the key of `load`.
    origin: where the text is from, in words.
    fingerprint: SHA-256 (hex) over paths and content of both splits.
    train: documents to learn from, in a fixed order.
    validation: documents held out, in a fixed order.
  """

  name: str
  origin: str
  fingerprint: str
  train: tuple[str, ...] = dataclasses.field(repr=False)
  validation: tuple[str, ...] = dataclasses.field(repr=False)

  def documents(self, split: str) -> tuple[str, ...]:
    """The documents of "train" or "validation"."""
    if split not in SPLITS:
      raise errors.unknown_name("split", split, SPLITS)
    return self.train if split == "train" else self.validation

  def describe(self) -> str:
    """One line for logs: name, origin, sizes, start of the fingerprint."""
    sizes = ", ".join(
      f"{split} {len(self.documents(split))} documents"
      f" {sum(map(len, self.documents(split))):,} characters"
      for split in SPLITS
    )
    return f"{self.name} ({self.origin}): {sizes}, {self.fingerprint[:12]}"


def load(name: str, path: str = "", seed: int = 0) -> Source:
  """The source of config fields data.source, data.path and data.seed.

  Args:
    name: "embedded", "text" or "synthetic".
    path: file or folder of "text"; must be empty for the others.
    seed: makes the documents of "synthetic"; the others do not depend on it.

  Raises:
    ValueError: unknown name, a path that nothing reads, unusable text.
    FileNotFoundError: nothing at path.
  """
  known = ("embedded", "text", "synthetic")
  if name not in known:
    raise errors.unknown_name("data.source", name, known)
  if name == "text":
    return text(path)
  if path:
    raise ValueError(
      f"data.path={path!r} is not read by data.source={name!r}; leave it "
      "empty, or set data.source=text"
    )
  return embedded() if name == "embedded" else synthetic(seed)


def embedded(
  root: str | None = None, packages: Iterable[str] = EMBEDDED_PACKAGES
) -> Source:
  """The Python sources of standard-library packages, tests excepted.

  The text differs between versions and builds of Python: see the fingerprint.

  Args:
    root: the folder of the packages; default: this interpreter's library.
    packages: names of packages, each a folder of root.

  Raises:
    FileNotFoundError: a package is missing, as in a Python without its sources.
  """
  folder = pathlib.Path(root or sysconfig.get_path("stdlib"))
  files = []
  for package in packages:
    found = [
      path
      for path in (folder / package).rglob("*.py")
      if not {"test", "tests"} & set(path.relative_to(folder).parts)
    ]
    if not found:
      raise FileNotFoundError(
        f"no sources of the standard-library package {package!r} in {folder}; "
        "install the full Python library, or set data.source=text and data.path"
      )
    files += found
  named = _read(folder, files)
  origin = f"Python {sysconfig.get_python_version()} standard library"
  train, validation = _split_by_path(named, EMBEDDED_VALIDATION_PERCENT)
  return Source("embedded", origin, _fingerprint(named), train, validation)


def text(path: str) -> Source:
  """A text file, or the *.txt files of a folder and its sub-folders, UTF-8.

  Each file is a document. A folder of at least ten files is split by a hash of
  their paths; of fewer, and of a single file, the last tenth of each file, cut
  at a line edge, is validation.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no path, no text files, empty files, bytes that are not UTF-8.
  """
  if not path:
    raise ValueError(
      "data.source=text needs data.path: a UTF-8 text file, or a folder with "
      ".txt files"
    )
  where = pathlib.Path(path).expanduser()
  if not where.exists():
    raise FileNotFoundError(
      f"nothing at data.path={path!r}; give a UTF-8 text file, or a folder "
      "with .txt files"
    )
  folder = where if where.is_dir() else where.parent
  files = [where]
  if where.is_dir():
    files = [file for file in where.rglob("*.txt") if file.is_file()]
  if not files:
    raise ValueError(
      f"no .txt file in the folder data.path={path!r}; give a folder with "
      "some, or one text file of any name"
    )
  named = [(name, body) for name, body in _read(folder, files) if body]
  if not named:
    raise ValueError(f"data.path={path!r} is empty; give files with text")
  if where.is_file():
    named = [("", named[0][1])]  # The fingerprint is of the content alone.
  if len(named) >= TEXT_MIN_FILES_TO_SPLIT_BY_PATH:
    train, validation = _split_by_path(named, TEXT_VALIDATION_PERCENT)
  else:
    train, validation = _split_tails(named, path)
  return Source("text", str(path), _fingerprint(named), train, validation)


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


def in_validation(path: str, percent: int) -> bool:
  """Whether a document is held out, from the SHA-256 of its relative path."""
  return _path_hash(path) % 100 < percent


def _path_hash(path: str) -> int:
  return int(hashlib.sha256(path.encode("utf-8")).hexdigest()[:8], 16)


def _read(
  folder: pathlib.Path, files: Iterable[pathlib.Path]
) -> list[tuple[str, str]]:
  """(relative path with '/', text) of each file, sorted by path."""
  named = []
  for file in files:
    try:
      body = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(
        f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
        f"{error.start}; convert the file (iconv -t UTF-8) or leave it out"
      ) from None
    named.append((file.relative_to(folder).as_posix(), body))
  return sorted(named)


def _fingerprint(named: Iterable[tuple[str, str]]) -> str:
  digest = hashlib.sha256()
  for name, body in named:
    content = body.encode("utf-8")
    # The lengths keep two different lists from having the same bytes.
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)
  return digest.hexdigest()


def _split_by_path(
  named: list[tuple[str, str]], percent: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Splits documents by a hash of their paths; at least one is held out."""
  held_out = {name for name, _ in named if in_validation(name, percent)}
  held_out.add(min((name for name, _ in named), key=_path_hash))
  return (
    tuple(body for name, body in named if name not in held_out),
    tuple(body for name, body in named if name in held_out),
  )


def _split_tails(
  named: list[tuple[str, str]], path: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Cuts the last tenth off each document, for validation."""
  cuts = [(body, _cut(body)) for _, body in named]
  train = tuple(body[:cut] for body, cut in cuts)
  validation = tuple(body[cut:] for body, cut in cuts if cut < len(body))
  if not validation:
    raise ValueError(
      f"data.path={path!r} has too little text to hold any of it out; give at "
      "least two characters"
    )
  return train, validation


def _cut(body: str) -> int:
  """Where validation starts: the line edge nearest to nine tenths of body."""
  goal = len(body) - len(body) * TEXT_VALIDATION_PERCENT // 100
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
