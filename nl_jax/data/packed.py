"""Files packed by gzip or zstandard, read as a stream of bytes."""

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

SUFFIXES = (".gz", ".zst")


def suffix(name: str) -> str:
  """How a file of that name is packed: one of `SUFFIXES`, or ""."""
  found = pathlib.PurePath(name.lower()).suffix
  return found if found in SUFFIXES else ""


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[BinaryIO]:
  """The bytes of a file, unpacked where its name says that it is packed.

  Args:
    path: of the file, or what reads as one.

  Raises:
    ValueError: it is packed, and not whole.
  """
  kind = suffix(path.name)
  with path.open("rb") as file:
    if not kind:
      yield file
      return
    # What zstandard says of damage comes as an OSError of no number.
    try:
      yield cast(BinaryIO, _UNPACK[kind](file))
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
      if isinstance(error, OSError) and error.errno:
        raise
      raise ValueError(
        f"{path} is not a whole {_NAMES[kind]} file ({error}); get it again or "
        "leave it out"
      ) from error


def _zstandard(file: Any) -> BinaryIO:
  import pyarrow

  stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")
  return io.BufferedReader(stream, 2**16)


_NAMES = {".gz": "gzip", ".zst": "zstandard"}
_UNPACK = {
  ".gz": lambda file: gzip.GzipFile(fileobj=file),
  ".zst": _zstandard,
}
