"""One case of the fuzz: run apart, and judged.

A case runs in a fork, so that what it does to memory, folders or the process
ends with it. It must end by itself with status 0 and what is right, or with
status 1 or 2 and one sentence.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

_LONGEST = 400  # Characters of a sentence that is quoted.
_ENDED = (0, 1, 2)


class Wrong(Exception):
  """What a case took and should not have, or gave and is not right."""


class Case(NamedTuple):
  """What is tried.

  Attributes:
    kind: of it, as "config" or "parquet".
    what: in words, with all that makes it again.
    run: the case; returns in words what came of it, raises what the library
      raises, or `Wrong`.
    seconds: it may take.
  """

  kind: str
  what: str
  run: Callable[[], str]
  seconds: int = 300


class Result(NamedTuple):
  """How a case ended.

  Attributes:
    kind, what: of the case.
    status: of its process; negative: the signal that killed it.
    said: what came of it, or its last line.
    fault: why it is wrong; "" if it is not.
    seconds: that it took.
  """

  kind: str
  what: str
  status: int
  said: str
  fault: str
  seconds: float


def run(case: Case) -> Result:
  """Runs a case in a fork."""
  begin = time.monotonic()
  with tempfile.TemporaryFile("w+", errors="replace") as out:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
      _child(case, out.fileno())
    _, status = os.waitpid(pid, 0)
    out.seek(0)
    text = out.read()
  code = os.waitstatus_to_exitcode(status)
  lines = text.strip().splitlines() or [""]
  return Result(
    case.kind, case.what, code, lines[-1][:_LONGEST], _fault(code, text),
    time.monotonic() - begin,
  )  # fmt: skip


def _fault(code: int, text: str) -> str:
  """Why an end is wrong; "" if it is not."""
  if code == -signal.SIGALRM:
    return "it did not end"
  if code < 0:
    return f"killed by {signal.Signals(-code).name}"
  if code not in _ENDED or "Traceback (most recent call" in text:
    return "a traceback" if "Traceback" in text else f"status {code}"
  return "" if text.strip() else "nothing was said"


def _child(case: Case, out: int) -> None:
  """Runs a case, and ends the process."""
  os.dup2(out, 1)
  os.dup2(out, 2)
  # Whatever stands in their place here, as where output is captured.
  sys.stdout = sys.stderr = open(1, "w", errors="replace", closefd=False)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.alarm(case.seconds)
  code = 70  # Of what no command turns into a sentence.
  try:
    code = _ended(case)
  finally:
    if code == 70:
      traceback.print_exc()
    with contextlib.suppress(ValueError, OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(code)


def _ended(case: Case) -> int:
  from experiments.cli import command

  try:
    with tempfile.TemporaryDirectory() as folder:
      os.chdir(folder)
      try:
        print(f"done: {case.run()}")
      finally:
        os.chdir("/")
  except SystemExit as error:  # Of flags: the sentence is its code.
    return _told(str(error.code)) if isinstance(error.code, str) else error.code
  except Wrong as error:
    print(f"wrong: {error}")
    return 71
  except command.MISTAKES as error:
    return _told(str(error))
  return 0


def _told(sentence: str) -> int:
  """Status 1, where it is one sentence of no more than some lines."""
  print(f"error: {sentence}")
  one = "\n" not in sentence.strip() and len(sentence) > 8
  return 1 if one else 72
