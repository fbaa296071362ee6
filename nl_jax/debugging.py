"""Whole traces beside the sentences of errors: NL_DEBUG=1.

`--debug` of a command sets the variable, so that the processes which it starts
have it too.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

_VARIABLE = "NL_DEBUG"


def start() -> None:
  """Asks for traces, in this process and those that it starts."""
  os.environ[_VARIABLE] = "1"


def on() -> bool:
  """Whether traces are asked for; then nothing is muted either."""
  return os.environ.get(_VARIABLE, "0") not in ("", "0")


def trace(error: BaseException) -> None:
  """Prints the whole trace of an error to stderr, if that is asked for."""
  if on():
    traceback.print_exception(error)
    sys.stderr.flush()


@contextlib.contextmanager
def muted() -> Iterator[int]:
  """Nothing on stderr, not from below Python either; yields the real one.

  Libraries write there what they then raise, or what is no mistake.
  """
  if on():
    yield 2
    return
  sys.stderr.flush()
  kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nothing, 2)
    yield kept
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nothing)
