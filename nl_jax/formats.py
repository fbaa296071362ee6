"""Formats of the files that are kept: runs, memories, prepared rows.

Each says a number, which is raised when what is written can no longer be read
as before. All numbers up to a version's own are read; what a version does not
know is refused in one sentence.
"""

import os
from typing import Any


class FormatError(ValueError):
  """A file of a format that this version does not read."""


def check(
  path: str | os.PathLike, what: str, found: Any, newest: int, otherwise: str
) -> int:
  """The format of a file.

  Args:
    path: of the file.
    what: it is, as "a memory".
    found: the number in it.
    newest: the largest number that is read.
    otherwise: what to do instead of updating, as "prepare the corpus again".

  Raises:
    FormatError: another number, or none.
  """
  if type(found) is int and 1 <= found <= newest:
    return found
  reads = f"formats 1 to {newest}" if newest > 1 else "format 1"
  raise FormatError(
    f"{path} is {what} of format {found!r}, and this version of nl_jax reads "
    f"{reads}; update nl_jax, or {otherwise}"
  )
