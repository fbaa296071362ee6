"""Documents in files: text, jsonl and parquet, read as a stream.

A document has a name that does not depend on how the files are read: the
file's path from the folder given, and its place there (bytes of jsonl, row of
parquet). What is held out is decided by names, so that every reader agrees.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from nl_jax import files as files_lib
from nl_jax.data import bad_documents, packed, parquet

# Those of text and jsonl may be packed.
SUFFIXES = {
  "text": (".txt",),
  "jsonl": (".jsonl", ".json"),
  "parquet": (".parquet",),
}
_ARRAY = ".json"  # Where it may be one JSON array, not an object a line.
_BLOCK = 2**20  # Bytes that are searched at once.


class Document(NamedTuple):
  """One document.

  Attributes:
    name: its file, and ":" and its place where a file has many.
    text: what it says.
  """

  name: str
  text: str


class Files(NamedTuple):
  """Files of one kind.

  Attributes:
    kind: a key of `SUFFIXES`.
    folder: that names are relative to.
    paths: of the files, sorted by name.
  """

  kind: str
  folder: pathlib.Path
  paths: tuple[pathlib.Path, ...]

  def name(self, path: pathlib.Path) -> str:
    """The path from the folder, with '/'."""
    return path.relative_to(self.folder).as_posix()


def find(path: str | pathlib.PurePath, kind: str) -> Files:
  """A file, or those of a folder and its sub-folders.

  Args:
    path: a file of any name, or a folder with files of the kind; a string, or
      a path object that reads as pathlib's do, wherever its files are.
    kind: "text", "jsonl" or "parquet".

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no path, or a folder without such files.
  """
  suffixes = SUFFIXES[kind]
  shown = " or ".join(suffixes)
  if not path:
    what = "a UTF-8 text file" if kind == "text" else f"a {suffixes[0]} file"
    raise ValueError(
      f"data.source={kind} needs data.path: {what}, or a folder with {shown} "
      "files"
    )
  where, folder = _location(path), root(path)
  if not where.exists():
    raise FileNotFoundError(
      f"nothing at data.path={path!r}; give a {kind} file, or a folder with "
      f"{shown} files"
    )
  if not where.is_dir():
    require_file(where)
    return Files(kind, folder, (where,))
  found = below(where, is_of(kind))
  if not found:
    others = [k for k in SUFFIXES if below(where, is_of(k))]
    advice = (
      f"it has {' and '.join(SUFFIXES[k][0] for k in others)} files: set "
      f"data.source={' or '.join(others)}"
      if others
      else f"give a folder with some, or one {kind} file of any name"
    )
    raise ValueError(
      f"no {shown} file in the folder data.path={path!r}; {advice}"
    )
  return Files(kind, folder, tuple(found))


def is_of(kind: str) -> Callable[[str], bool]:
  """Whether a file of a name is of a kind, as its ending says."""
  if kind == "parquet":  # It is packed inside.
    return lambda name: name.lower().endswith(SUFFIXES[kind])
  return lambda name: _bare(name).endswith(SUFFIXES[kind])


def _bare(name: str) -> str:
  """A name without the ending that says how the file is packed."""
  return name.lower().removesuffix(packed.suffix(name))


def below(
  folder: pathlib.PurePath, wanted: Callable[[str], bool]
) -> list[pathlib.Path]:
  """The files of a folder and its sub-folders, sorted.

  Links are followed, to folders too; one that leads back to a folder that it
  is in shows nothing new, and is passed by.

  Args:
    folder: of this machine, or a path object as of `find`.
    wanted: whether a file of that name is.

  Raises:
    ValueError: a wanted file is a link that leads nowhere, or a pipe.
    OSError: a folder that cannot be read.
  """
  store = cast(pathlib.Path, folder)  # It has the methods, and no links.
  here = isinstance(folder, pathlib.Path)
  every = _walk(store, ()) if here else store.rglob("*")
  found = sorted(path for path in every if wanted(path.name))
  for path in found:
    require_file(path)
  return found


def _walk(
  folder: pathlib.Path, above: tuple[pathlib.Path, ...]
) -> Iterator[pathlib.Path]:
  real = folder.resolve()
  if real in above:
    return
  for path in folder.iterdir():
    if path.is_dir():
      yield from _walk(path, (*above, real))
    else:
      yield path


def require_file(path: pathlib.Path) -> None:
  """Raises ValueError for a link to nothing, a pipe, a device and the like."""
  if not path.exists():
    raise ValueError(
      f"{path} is a symbolic link that leads nowhere; fix it or remove it"
    )
  if not path.is_file():
    raise ValueError(
      f"{path} is not a plain file (a pipe, say), and files are read more than "
      "once; write its content to a file"
    )


def root(path: str | pathlib.PurePath) -> pathlib.Path:
  """The folder that the names of documents are relative to."""
  where = _location(path)
  return where if where.is_dir() else where.parent


def _location(path: str | pathlib.PurePath) -> pathlib.Path:
  if isinstance(path, str):
    return files_lib.expand(path)
  return cast(pathlib.Path, path)  # One of a store has the same methods.


def read(
  files: Files,
  path: pathlib.Path,
  text_key: str = "text",
  start: int = 0,
  stop: int | None = None,
  bad: bad_documents.OnBad = bad_documents.refuse,
  separator: str = "",
) -> Iterator[Document]:
  """The documents of a file, or of a part of it, in order.

  Args:
    files: that it is one of.
    path: the file.
    text_key: the field of jsonl, or the column of parquet, with the text.
    start: first byte of jsonl or text, first row group of parquet.
    stop: the byte or row group after the last; None: all.
    bad: takes the documents that cannot be used.
    separator: between the documents of a text file, with the line breaks around
      it; "": the file is one.

  Raises:
    ValueError: not what the kind says; the sentence names the place.
  """
  name = files.name(path)
  if files.kind == "text" and separator:
    found = _parted(path, name, separator.encode("utf-8"), start, stop)
  elif files.kind == "text":
    found = iter([(name, functools.partial(_text, path, start, stop))])
  elif files.kind == "parquet":
    found = parquet.documents(path, name, text_key, start, stop)
  elif is_array(path):
    found = _array(path, name, text_key)
  else:
    found = _jsonl(path, name, text_key, start, stop)
  for place, text in found:
    try:
      document = Document(place, text())
    except bad_documents.BadDocumentError as error:
      bad(error)
    else:
      yield document


def decode(content: bytes, path: pathlib.Path | str, offset: int = 0) -> str:
  """UTF-8 bytes of a file as text.

  Args:
    content: the bytes.
    path: of the file, or words for the place.
    offset: of the first byte in it.

  Raises:
    BadDocumentError: they are not UTF-8; the sentence names the byte.
  """
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise bad_documents.BadDocumentError(
      f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
      f"{offset + error.start}; convert the file (iconv -t UTF-8) or leave it "
      "out"
    ) from error


def in_one(path: pathlib.Path) -> bool:
  """Whether a file can only be read from its beginning to its end."""
  return bool(packed.suffix(path.name)) or is_array(path)


def is_array(path: pathlib.Path) -> bool:
  """Whether a .json file is one array of objects, not an object a line."""
  if not _bare(path.name).endswith(_ARRAY):
    return False
  with packed.opened(path) as file:
    while (first := file.read(1)).isspace():
      pass
  return first == b"["


def _text(path: pathlib.Path, start: int, stop: int | None) -> str:
  return decode(_bytes(path, start, stop), path, start)


def _bytes(path: pathlib.Path, start: int, stop: int | None) -> bytes:
  with packed.opened(path) as file:
    if start:
      file.seek(start)
    return file.read(-1 if stop is None else stop - start)


def _parted(
  path: pathlib.Path,
  name: str,
  separator: bytes,
  start: int,
  stop: int | None,
) -> bad_documents.Found:
  offset = start
  for part in _bytes(path, start, stop).split(separator):
    text = part.lstrip(b"\r\n")
    place = offset + len(part) - len(text)
    text = text.rstrip(b"\r\n")
    yield f"{name}:{offset}", functools.partial(decode, text, path, place)
    offset += len(part) + len(separator)


def behind(path: pathlib.Path, goal: int, separator: str) -> int | None:
  """The first byte after a separator that ends there or later; None: none.

  Args:
    path: of a text file that is not packed.
    goal: the byte.
    separator: between its documents.
  """
  mark = separator.encode("utf-8")
  at = max(goal - len(mark), 0)
  with path.open("rb") as file:
    file.seek(at)
    held = b""
    while block := file.read(_BLOCK):
      held += block
      if (found := held.find(mark)) >= 0:
        return at + found + len(mark)
      at += max(len(held) - len(mark) + 1, 0)
      held = held[-len(mark) + 1 :] if len(mark) > 1 else b""
  return None


def _jsonl(
  path: pathlib.Path, name: str, key: str, start: int, stop: int | None
) -> bad_documents.Found:
  offset = start
  before = functools.cache(lambda: _line_number(path, start))
  for number, line in enumerate(_lines(path, start)):
    if stop is not None and offset >= stop:
      return
    if line.strip():
      # Counted only for an error: a reader may start anywhere.
      where = lambda i=number: f"{path}, line {before() + i}"
      text = functools.partial(_field, path, offset, line, key, where)
      yield f"{name}:{offset}", text
    offset += len(line)


def _lines(path: pathlib.Path, start: int) -> Iterator[bytes]:
  with packed.opened(path) as file:
    if start:
      file.seek(start)
    yield from file


def _array(path: pathlib.Path, name: str, key: str) -> bad_documents.Found:
  with packed.opened(path) as file:
    content = file.read()
  values = _parsed(decode(content, path), lambda: str(path))
  for i, value in enumerate(values):
    where = lambda i=i: f"{path}, entry {i}"
    yield f"{name}:{i}", functools.partial(_of_object, value, key, where)


def _field(
  path: pathlib.Path,
  offset: int,
  line: bytes,
  key: str,
  where: Callable[[], str],
) -> str:
  """The text of a line of jsonl."""
  return _of_object(_parsed(decode(line, path, offset), where), key, where)


def _parsed(text: str, where: Callable[[], str]) -> Any:
  try:
    return json.loads(text)
  except RecursionError as error:
    raise bad_documents.BadDocumentError(
      f"{where()}: JSON that is nested too deep to be read; leave it out"
    ) from error
  except ValueError as error:  # Python reads no number of 5,000 digits.
    raise bad_documents.BadDocumentError(
      f"{where()}: not JSON ({error})"
    ) from error


def _of_object(value: Any, key: str, where: Callable[[], str]) -> str:
  if not isinstance(value, dict) or key not in value:
    has = ", ".join(value) if isinstance(value, dict) else "no object"
    raise bad_documents.BadDocumentError(
      f"{where()}: no field {key!r} (it has: {has}); set data.text_key"
    )
  return bad_documents.string(value[key], key, where)


def _line_number(path: pathlib.Path, offset: int) -> int:
  """The number, from 1, of the line that begins at a byte."""
  count, number = 0, 1
  with packed.opened(path) as file:
    while count < offset:
      line = file.readline()
      count, number = count + len(line), number + 1
  return number
