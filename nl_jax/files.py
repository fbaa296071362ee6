"""Files that are whole or not there; hashes of them.

A file is written beside its place and moved there when all of it is on disk.
Nothing is opened through a link that somebody left in a shared folder.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

ADVICE = "free space, mend the permissions, or give another place"
_BLOCK = 2**20  # Bytes.
_SEAL = "sha256"


class StorageError(OSError):
  """A file cannot be written; the message says which, why, and what to do."""

  @classmethod
  def of(
    cls, path: str | os.PathLike, reason: object, advice: str = ADVICE
  ) -> "StorageError":
    """The sentence about a path."""
    return cls(f"{path} cannot be written: {reason}; {advice}")


@contextlib.contextmanager
def writing(path: str | os.PathLike, advice: str = ADVICE) -> Iterator[None]:
  """What the system says of a path becomes a `StorageError`."""
  try:
    yield
  except StorageError:
    raise
  except OSError as error:
    raise StorageError.of(path, error.strerror or error, advice) from error


@contextlib.contextmanager
def whole(path: str | os.PathLike, advice: str = ADVICE) -> Iterator[BinaryIO]:
  """A file to write, put in its place when the context ends without an error.

  Killed at any moment, the path holds the old or the new file. After an error
  nothing of the new one is left.

  Raises:
    StorageError: the system refuses.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  with writing(path, advice):
    file = _new(temporary)
    own = os.fstat(file.fileno()).st_ino
    try:
      with file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      if os.stat(temporary, follow_symlinks=False).st_ino != own:
        raise StorageError.of(path, "another process writes it too", advice)
      temporary.replace(path)
    except BaseException:
      with contextlib.suppress(OSError):
        if os.stat(temporary, follow_symlinks=False).st_ino == own:
          temporary.unlink()
      raise


def _new(path: pathlib.Path) -> BinaryIO:
  """Opens a file that nobody else made; what a killed process left goes."""
  path.unlink(missing_ok=True)
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
  return os.fdopen(os.open(path, flags, 0o666), "wb")


def replace(
  path: str | os.PathLike, content: str | bytes, advice: str = ADVICE
) -> None:
  """Writes a file as a whole; text as UTF-8.

  Raises:
    StorageError: the system refuses.
  """
  data = content.encode("utf-8") if isinstance(content, str) else content
  with whole(path, advice) as file:
    file.write(data)


def check_place(path: str | os.PathLike, flag: str, size: int = 0) -> None:
  """Finds before long work that a file could not be written at its end.

  Args:
    path: of the file.
    flag: that named it, as "--out".
    size: bytes that it will take, about.

  Raises:
    ValueError: a folder is there, or there is no folder to write it in.
    StorageError: the system refuses, or has too little space.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f"{flag}={path} is a folder; give it a file")
  if not path.parent.is_dir():
    raise ValueError(
      f"{flag}={path}: there is no folder {path.parent}; make it, or give "
      "another file"
    )
  probe = path.with_name(f".{path.name}.probe")
  with writing(path):
    try:
      _new(probe).close()
    finally:
      with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
    room = os.statvfs(path.parent)
  free = room.f_bavail * room.f_frsize
  if free < size:
    raise StorageError.of(
      path, f"it takes {size:,} bytes, and {free:,} are free"
    )


def refuse_taken(flag: str, *paths: str | os.PathLike) -> None:
  """Raises ValueError where something would be replaced.

  Args:
    flag: that names the first file, as "--out".
    paths: of the files that would be written.
  """
  for path in map(pathlib.Path, paths):
    if path.is_file():
      raise ValueError(
        f"{path} is there already: give {flag} another file, or --overwrite "
        "to replace it"
      )


def sha256(path: str | os.PathLike) -> str:
  """SHA-256 (hex) of a file."""
  digest = hashlib.sha256()
  with pathlib.Path(path).open("rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


class BrokenSealError(ValueError):
  """What is not what was written."""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """JSON values with a hash of themselves."""
  return {**values, _SEAL: json_hash(values)}


def unsealed(values: Mapping[str, Any], what: str) -> dict[str, Any]:
  """JSON values without their hash; those of before have none.

  Args:
    values: of `sealed`.
    what: they are, for the sentence.

  Raises:
    BrokenSealError: they are not what was written.
  """
  bare = dict(values)
  expected = bare.pop(_SEAL, None)
  if expected is not None and expected != json_hash(bare):
    raise BrokenSealError(f"{what} is not what was written")
  return bare


def json_hash(value: Any) -> str:
  """SHA-256 (hex) of a JSON value, however its keys are ordered."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()
