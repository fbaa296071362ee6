"""Trials: each is made once, and kept as a JSON file that is whole.

A command that compares makes many. What lies in its folder is not made again,
so a command that was killed resumes where it stopped.
"""

import concurrent.futures
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from nl_jax import files

T = TypeVar("T")
R = TypeVar("R")
Result = dict[str, Any]


def once(path: pathlib.Path, make: Callable[[], Result]) -> tuple[Result, bool]:
  """The result of a trial, made where it is not in its file.

  Args:
    path: of the file, in a folder that need not be there.
    make: gives the result, of JSON values; `seconds` is added.

  Returns:
    The result, and whether it was made now.

  Raises:
    ValueError: the file is not JSON.
    StorageError: the system refuses to write it.
  """
  if path.exists():
    return files.read_json(path), False
  begin = time.monotonic()
  result = make()
  result |= {"seconds": time.monotonic() - begin}
  save(path, result)
  return result, True


def save(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file as a whole, in a folder that is made if missing.

  Raises:
    StorageError: the system refuses.
  """
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(value, indent=1) + "\n")


def held(folder: pathlib.Path) -> list[Result]:
  """The results in a folder, by the names of their files."""
  return [files.read_json(path) for path in sorted(folder.glob("*.json"))]


def side_by_side(
  trials: Iterable[T],
  make: Callable[[T], R],
  jobs: int,
  stop: Callable[[], None] = lambda: None,
) -> Iterator[R]:
  """Results as they come, of so many trials at a time.

  Args:
    trials: all.
    make: of one; runs in a thread.
    jobs: trials at a time.
    stop: ends those under way, where whoever asked for results goes.
  """
  pool = concurrent.futures.ThreadPoolExecutor(jobs)
  try:
    made = [pool.submit(make, trial) for trial in trials]
    for future in concurrent.futures.as_completed(made):
      yield future.result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    stop()
    pool.shutdown()  # Nothing is under way when the caller continues.
