"""Cuts a corpus into the input of shards, by the bytes of its files alone.

Neither the number of workers nor the machine enters, so that the same files
and settings always give the same shards. A piece is read as a stream.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from nl_jax.data import bad_documents, documents, parquet, sources

KINDS = tuple(documents.SUFFIXES)


class Settings(NamedTuple):
  """What decides the shards.

  Attributes:
    kind: of the files, one of KINDS.
    path: file or folder.
    tokenizer: "bytes" or a path.
    sequence_length: T.
    alignment: documents start at its multiples.
    text_key: field or column with the text.
    validation_percent: of the text, held out; chosen as in `sources.files`.
    shard_bytes: of input in a shard, about.
    document_bytes: a longer text file is cut into documents at line edges.
    bad_documents: "refuse", or "skip" those that cannot be used.
    separator: between the documents of a text file; "": each is one.
    bos, special_tokens: of `tokenizers.load`.
  """

  kind: str
  path: str
  tokenizer: str
  sequence_length: int
  alignment: int
  text_key: str = "text"
  validation_percent: float = float(sources.VALIDATION_PERCENT)
  shard_bytes: int = 2**26
  document_bytes: int = 2**20
  bad_documents: str = bad_documents.POLICIES[0]
  separator: str = ""
  bos: bool = False
  special_tokens: str = "parse"


class Piece(NamedTuple):
  """A part of a file.

  Attributes:
    name: of the file, from the folder of the corpus.
    start, stop: bytes, or row groups of parquet; stop None: to the end.
    size: bytes.
    split: that it belongs to; "" where each document has its own.
  """

  name: str
  start: int
  stop: int | None
  size: int
  split: str = ""


def plan(settings: Settings) -> list[tuple[Piece, ...]]:
  """The input of each shard.

  Raises:
    FileNotFoundError, ValueError: no files, or none with text.
  """
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


def read(
  piece: Piece,
  settings: Settings,
  bad: bad_documents.OnBad = bad_documents.refuse,
) -> Iterator[tuple[documents.Document, str]]:
  """The documents of a piece that are not empty, and the split of each.

  Args:
    piece: of `plan`.
    settings: of all.
    bad: takes the documents that cannot be used.

  Raises:
    ValueError: unusable text; the sentence names the place.
  """
  folder = documents.root(settings.path)
  files = documents.Files(settings.kind, folder, (folder / piece.name,))
  for document in documents.read(
    files,
    files.paths[0],
    settings.text_key,
    piece.start,
    piece.stop,
    bad,
    settings.separator,
  ):
    if _is_text(settings) and piece.stop is None:
      yield from _unpacked(document, piece.split, settings)
    elif document.text:
      yield document, piece.split or _split_of(document.name, settings)


def _unpacked(
  document: documents.Document, split: str, settings: Settings
) -> Iterator[tuple[documents.Document, str]]:
  """The parts of a packed text file, which has no bytes to be cut at."""
  name, text = document
  edge = len(text)
  if not split:
    edge = sources.cut(text, settings.validation_percent)
  for part, its in ((text[:edge], "train"), (text[edge:], "validation")):
    start, limit = 0, settings.document_bytes
    while start < len(part):
      stop = part.find("\n", start + limit - 1, start + 2 * limit) + 1
      stop = stop or start + limit
      yield documents.Document(name, part[start:stop]), split or its
      start = stop


def training_texts(settings: Settings) -> Iterator[str]:
  """The documents that are not held out, as a stream."""
  bad = bad_documents.on_bad(settings.bad_documents)
  for pieces in plan(settings):
    for piece in pieces:
      for document, split in read(piece, settings, bad):
        if split == "train":
          yield document.text


def _is_text(settings: Settings) -> bool:
  """Whether a file is one text, and not many documents."""
  return settings.kind == "text" and not settings.separator


def _pieces(files: documents.Files, settings: Settings) -> Iterator[Piece]:
  is_text = _is_text(settings)
  splits = _text_splits(files, settings) if is_text else {}
  for path in files.paths:
    name = files.name(path)
    if files.kind == "parquet":
      groups = parquet.row_groups(path, settings.text_key)
      for i, (_, size) in enumerate(groups):
        yield Piece(name, i, i + 1, size)
      continue
    size = path.stat().st_size
    parts = splits.get(name, [(0, size, "")])
    if documents.in_one(path):
      split = parts[0][2] if len(parts) == 1 else ""
      yield Piece(name, 0, None, size, split)
      continue
    limit = settings.document_bytes if is_text else settings.shard_bytes
    for start, stop, split in parts:
      for low, high in _cut(path, start, stop, limit, settings):
        yield Piece(name, low, high, high - low, split)


def _text_splits(
  files: documents.Files, settings: Settings
) -> dict[str, list[tuple[int, int, str]]]:
  """(start, stop, split) of the parts of each text file.

  Many files are split by their names; of few the last part is held out.
  """
  sizes = {files.name(path): path.stat().st_size for path in files.paths}
  percent = settings.validation_percent
  if len(sizes) >= sources.MIN_DOCUMENTS_TO_SPLIT_BY_NAME:
    held_out = sources.held_out(sizes, percent)
    return {
      name: [(0, size, "validation" if name in held_out else "train")]
      for name, size in sizes.items()
    }
  parts = {}
  for path in files.paths:
    size = sizes[files.name(path)]
    goal = min(size - int(size * percent / 100), max(1, size - 1))
    edge = _nearest_edge(path, goal, size, settings.document_bytes)
    parts[files.name(path)] = [(0, edge, "train"), (edge, size, "validation")]
  return parts


def _split_of(name: str, settings: Settings) -> str:
  held_out = sources.in_validation(name, settings.validation_percent)
  return "validation" if held_out else "train"


def _cut(
  path: pathlib.Path, start: int, stop: int, limit: int, settings: Settings
) -> Iterator[tuple[int, int]]:
  """Ranges of about `limit` bytes, cut after line ends, or separators."""
  while start < stop:
    edge = stop
    if stop - start > limit and settings.separator:
      behind = documents.behind(path, start + limit, settings.separator)
      edge = min(behind or stop, stop)
    elif stop - start > limit:
      # A line of jsonl is a document, however long.
      longest = limit if _is_text(settings) else -1
      edge = _edge(path, start + limit, stop, longest)
    yield start, edge
    start = edge


def _edge(path: pathlib.Path, goal: int, stop: int, longest: int) -> int:
  """The first line edge at or after a byte, `stop` where there is none.

  Args:
    path: of the file.
    goal: the byte.
    stop: the end of what is cut.
    longest: bytes of a line; one that continues is cut between two characters.
      -1: none is cut.
  """
  with path.open("rb") as file:
    file.seek(max(goal - 1, 0))
    line = file.readline(longest)
    if line.endswith(b"\n") or file.tell() >= stop or longest < 0:
      return min(file.tell(), stop)
  return min(_character_edge(path, goal), stop)


def _nearest_edge(
  path: pathlib.Path, goal: int, stop: int, longest: int
) -> int:
  """The line edge nearest to a byte, none of both ends, as `sources.files`."""
  after = _edge(path, goal, stop, longest)
  low = max(0, goal - 1 - longest)
  with path.open("rb") as file:
    file.seek(low)
    before = low + file.read(goal - 1 - low).rfind(b"\n") + 1
  edges = [edge for edge in (after, before) if low < edge < stop]
  nearest = min(edges, key=lambda edge: abs(edge - goal), default=goal)
  return min(_character_edge(path, nearest), stop)


def _character_edge(path: pathlib.Path, goal: int) -> int:
  """The first byte at or after another that begins a character."""
  with path.open("rb") as file:
    file.seek(goal)
    inside = [byte & 0xC0 == 0x80 for byte in file.read(4)]
  return goal + [*inside, False].index(False)
