"""Files that are whole or not there, locks, hashes: once for every room.

Others may write to a folder, too, and lay a symbolic link where a file is about
to be made; what is opened here never goes through one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

ADVICE = "free space, fix the permissions, or give another place"
_BLOCK = 2**20  # Bytes.
_SEAL = "sha256"


class HeldError(ValueError):
  """A lock that another process holds."""


class BrokenSealError(ValueError):
  """What is not what was written."""


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


def expand(path: str | os.PathLike) -> pathlib.Path:
  """A path whose "~" or "~name" is the home folder of a user.

  Raises:
    ValueError: there is no such user.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    name = str(path).partition("/")[0]
    raise ValueError(
      f"{path}: there is no user of the name {name[1:]!r}, whose home folder "
      f"{name} would be; write ./{path} for a folder of that name"
    ) from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file to write to, that takes the place of `path` at the end.

  Killed at any moment, `path` is the old file or the new one; where the block
  raises, it is the old one, and nothing else stays.

  Raises:
    OSError: the system refuses.
  """
  hidden = beside(path)
  try:
    with create(hidden) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    hidden.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):  # The first error is reported.
      hidden.unlink(missing_ok=True)
    raise


def beside(path: pathlib.Path) -> pathlib.Path:
  """Where a file is made before it takes its place."""
  return path.with_name(f".{path.name}.tmp")


def create(path: pathlib.Path) -> BinaryIO:
  """A new file, in the place of what a killed process left there.

  Raises:
    OSError: the system refuses.
  """
  path.unlink(missing_ok=True)
  how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
  return os.fdopen(os.open(path, how, 0o666), "wb")


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file as a whole; a text as UTF-8.

  Raises:
    OSError: the system refuses.
  """
  if isinstance(content, str):
    content = content.encode("utf-8")
  with replacing(path) as file:
    file.write(content)


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
  hidden = beside(path)
  with writing(path):
    create(hidden).close()
    hidden.unlink()
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
        f"{path} already exists: give {flag} another file, or --overwrite "
        "to replace it"
      )


def sha256(path: str | os.PathLike) -> str:
  """SHA-256 (hex) of a file."""
  digest = hashlib.sha256()
  with pathlib.Path(path).open("rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


def json_hash(value: Any) -> str:
  """SHA-256 (hex) of a JSON value, however its keys are ordered."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
  """JSON values with a hash of themselves."""
  return {**values, _SEAL: json_hash(values)}


def unsealed(values: Mapping[str, Any], what: str) -> dict[str, Any]:
  """JSON values without their hash; those of earlier versions have none.

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


def read_json(path: pathlib.Path) -> Any:
  """The value of a JSON file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it holds none, or one that Python does not read.
  """
  try:
    return json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error})") from error


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Holds a file for this process; the system frees it on any death.

  Args:
    path: of the file, made if missing.

  Raises:
    HeldError: another process holds it.
    ValueError: there is no plain file in that place.
    OSError: the system refuses.
  """
  how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
  try:
    descriptor = os.open(path, how, 0o666)
  except OSError as error:
    if error.errno == errno.ELOOP:
      raise _no_file(path, "a symbolic link") from error
    raise
  with os.fdopen(descriptor, "rb") as file:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      raise _no_file(path, "not a plain file")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise HeldError(f"another process holds {path}") from error
    yield


def _no_file(path: pathlib.Path, what: str) -> ValueError:
  return ValueError(
    f"{path} is {what}, and commands hold a folder by a file of their own; "
    "remove it"
  )
