"""Signals that end a run: they set a flag, the loop saves and returns."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PREEMPTED = "preempted"
INTERRUPTED = "interrupted"
_KILLED = 130


class Stop:
  """What was asked for.

  Attributes:
    reason: "", `PREEMPTED` (SIGTERM) or `INTERRUPTED` (Ctrl-C).
  """

  def __init__(self, alone: bool = True):
    """Args: whether there is no other process to agree with."""
    self.reason = ""
    self._alone = alone

  def terminate(self, signum: int, frame: FrameType | None) -> None:
    """SIGTERM: save and end."""
    del signum, frame
    self.reason = self.reason or PREEMPTED

  def interrupt(self, signum: int, frame: FrameType | None) -> None:
    """Ctrl-C: the first saves and ends, the second ends at once."""
    del signum, frame
    if self.reason == INTERRUPTED:
      # Not an exception: a save in flight would be waited for.
      os._exit(_KILLED)
    self.reason = INTERRUPTED
    if not self._alone:
      # jax.distributed watches for it, and has all end at the same step.
      signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def listen(*, alone: bool = True) -> Iterator[Stop]:
  """Catches the signals while the context lasts.

  Args:
    alone: one process; where there are several, jax.distributed watches for
      SIGTERM, and Ctrl-C becomes one.
  """
  stop = Stop(alone)
  if threading.current_thread() is not threading.main_thread():
    yield stop  # Only the main thread may set handlers.
    return
  handlers = {signal.SIGINT: stop.interrupt}
  if alone:
    handlers[signal.SIGTERM] = stop.terminate
  before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
  try:
    yield stop
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
