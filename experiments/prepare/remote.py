"""Files of a store (gs://, s3://, ...) through Apache Beam's file systems.

`Remote` reads as `pathlib.Path` does, as far as `nl_jax.data` asks. `Folder` is
the output, here or in a store: each of its files is whole or not there.
"""

import concurrent.futures
import functools
import pathlib
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from apache_beam.io import filesystem, filesystems

_MANY = 32  # Files that are fetched at once: each waits for its store.
_RAW = filesystem.CompressionTypes.UNCOMPRESSED  # `documents` unpacks.


class Stat(NamedTuple):
  """What of os.stat_result is asked for.

  Attributes:
    st_size: bytes.
  """

  st_size: int


class Remote(pathlib.PurePosixPath):
  """A file or folder of a store, by its address `scheme://...`."""

  _known: Stat | None = None  # From the listing that found it.

  def __str__(self) -> str:
    """The address; a path has one slash where an address has two."""
    scheme, _, rest = super().__str__().partition(":/")
    return f"{scheme}://{rest}" if rest else super().__str__()

  def __repr__(self) -> str:
    return repr(str(self))

  def open(self, mode: str) -> BinaryIO:
    """Opens a file to be read."""
    if mode != "rb":
      raise ValueError(f"{self} is opened with 'rb' only, got {mode!r}")
    return filesystems.FileSystems.open(str(self), compression_type=_RAW)

  def stat(self) -> Stat:
    """Size and time of a file."""
    if self._known:
      return self._known
    found = _match(str(self))
    if not found:
      raise FileNotFoundError(f"no file {self}")
    return Stat(found[0].size_in_bytes)

  def is_file(self) -> bool:
    """Whether there is a file of that address."""
    return bool(self._known or _match(str(self)))

  def is_dir(self) -> bool:
    """Whether there are files below."""
    return _has_files(str(self))

  def exists(self) -> bool:
    """Whether there is anything."""
    return self.is_file() or self.is_dir()

  def rglob(self, pattern: str) -> Iterator["Remote"]:
    """The files below, of all sub-folders."""
    for found in _match(f"{self}/**"):
      path = Remote(found.path)
      path._known = Stat(found.size_in_bytes)
      if path.match(pattern):
        yield path


class Folder:
  """A folder to write to.

  Args:
    where: of this machine, or an address of a store.
  """

  def __init__(self, where: str):
    self._where = where

  def path(self, name: str) -> str:
    """The place of a file."""
    return filesystems.FileSystems.join(self._where, *name.split("/"))

  def is_empty(self) -> bool:
    """Whether there is no file."""
    return not _match(self.path("**"), 1)

  def names(self, pattern: str) -> list[str]:
    """The names of files of the folder itself, sorted."""
    found = _match(self.path(pattern))
    return sorted(posixpath.basename(x.path) for x in found)

  def put(self, folder: pathlib.Path, names: Iterable[str]) -> None:
    """Copies files of a local folder here, one after the other."""
    for name in names:
      head, tail = posixpath.split(name)
      hidden = self.path(posixpath.join(head, f".{tail}.tmp"))
      with filesystems.FileSystems.create(
        hidden, compression_type=_RAW
      ) as file:
        file.write((folder / name).read_bytes())
      filesystems.FileSystems.rename([hidden], [self.path(name)])

  def get(self, folder: pathlib.Path, names: Iterable[str]) -> list[str]:
    """Copies the files that are there into a local folder; returns these."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_MANY) as pool:
      got = pool.map(functools.partial(self._get, folder), names)
      return [name for name, is_there in zip(names, got) if is_there]

  def _get(self, folder: pathlib.Path, name: str) -> bool:
    found = _match(self.path(name))
    if not found:
      return False
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with filesystems.FileSystems.open(
      found[0].path, compression_type=_RAW
    ) as file:
      (folder / name).write_bytes(file.read())
    return True

  def remove(self, pattern: str) -> None:
    """Removes files."""
    found = [x.path for x in _match(self.path(pattern))]
    if found:
      filesystems.FileSystems.delete(found)


def _match(pattern: str, limit: int | None = None) -> list[Any]:
  results = filesystems.FileSystems.match([pattern], [limit])
  return results[0].metadata_list


@functools.lru_cache(maxsize=64)
def _has_files(where: str) -> bool:
  """Asked for each piece of the input, and answered by a listing."""
  return bool(_match(f"{where}/**", 1))
