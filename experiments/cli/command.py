"""Runs a command: its flags, its exit status, its errors as one sentence.

Exit status (docs/architecture.md 3): 0 done, or stopped after saving; 1 a
mistake or failure; 3 part of the work failed; 130 Ctrl-C; 143 SIGTERM where
nothing is to be saved.
"""

import contextlib
import functools
import logging as std_logging
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from experiments.cli import distributed, named

DONE = 0
FAILED = 1
PARTLY_FAILED = 3
INTERRUPTED = 130
TERMINATED = 143

_DEBUG = flags.DEFINE_boolean(
  "debug", False, "Show the traceback of an error, not only its sentence."
)
_EXTRAS = {"datasets": "hf"}  # Of setup.py, where it is not `train`.
_ROOT = pathlib.Path(__file__).parents[2]
_AGAIN = 0.05  # Seconds.
_REMIND = 60.0  # Seconds between two lines of `busy`.
# What a room raises for a user's mistake, and what the system refuses.
MISTAKES = (ValueError, OSError, FloatingPointError, MemoryError)


def run(main: Callable[[], int]) -> None:
  """Parses the flags, calls main(), and exits with the status it returns."""
  plain = std_logging.Formatter("%(message)s")
  logging.get_absl_handler().setFormatter(plain)
  # Tells of every accelerator that is not here.
  std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)
  sys.unraisablehook = _unraisable
  guarded = functools.partial(_guarded, main)
  app.run(lambda argv: guarded(), flags_parser=named.parse)


def _guarded(main: Callable[[], int]) -> int:
  with distributed.Together():
    try:
      return main()
    except KeyboardInterrupt:
      return _stopped("stopped by Ctrl-C", INTERRUPTED)
    except ModuleNotFoundError as error:
      if _DEBUG.value:
        raise
      return _stopped(f"error: {_missing_module(error)}", FAILED)
    except MISTAKES as error:
      if _DEBUG.value:
        raise
      return _stopped(f"error: {error}{_origin(error)}", FAILED)
    except RuntimeError as error:
      sentence = None
      if not _DEBUG.value:
        sentence = _too_large(error) or distributed.lost(error)
      if sentence is None:
        raise
      return _stopped(f"error: {sentence}", FAILED)


def _too_large(error: RuntimeError) -> str | None:
  """The sentence for a computation that found too little memory."""
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
    return None
  first = text.strip().splitlines()[0][:160]
  return (
    f"the devices have too little memory ({first}); give a smaller model, "
    "batch or text, or more devices"
  )


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
  """Lets Ctrl-C come again where it fell into a callback of Python's own.

  What is raised in those, as while libraries are imported, Python only prints.
  """
  if not issubclass(what.exc_type, KeyboardInterrupt):
    sys.__unraisablehook__(what)
    return
  again = (os.getpid(), signal.SIGINT)
  threading.Timer(_AGAIN, os.kill, again).start()


def _stopped(text: str, status: int) -> int:
  say(text)
  distributed.leave(text.removeprefix("error: "), status)
  return status


def say(text: str) -> None:
  """Prints to stderr; stdout is for what a command was asked for."""
  print(text, file=sys.stderr, flush=True)


def tell(text: str) -> None:
  """`say`, once however many processes there are."""
  if distributed.first():
    say(text)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
  """Says at once what takes long, and every minute while it lasts.

  Args:
    what: as "compiling the train step".
  """
  begin, done = time.monotonic(), threading.Event()

  def remind() -> None:
    while not done.wait(_REMIND):
      minutes = round((time.monotonic() - begin) / 60)
      tell(f"still {what}, for {minutes} min now")

  tell(f"{what} ...")
  thread = threading.Thread(target=remind, name="busy", daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _missing_module(error: ModuleNotFoundError) -> str:
  name = (error.name or "").partition(".")[0]
  extra = _EXTRAS.get(name, "train")
  return (
    f"{name or error} is not installed: run `pip install -e .[{extra}]` in "
    f"{_ROOT}"
  )


def _origin(error: BaseException) -> str:
  """Where an error that is not one of our sentences came from."""
  frames = traceback.extract_tb(error.__traceback__)
  if frames and pathlib.Path(frames[-1].filename).is_relative_to(_ROOT):
    return ""
  return f" ({type(error).__name__}; --debug shows the traceback)"
