"""Where the time of a run goes: training, waiting for data, and pauses."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Interval(NamedTuple):
  """Between two readings.

  Attributes:
    steps: that were handled.
    seconds: of training, pauses left out.
    waiting: seconds of these spent waiting for data.
  """

  steps: int
  seconds: float
  waiting: float


class Timer:
  """Counts training time; evaluation, checkpoints and compiling are pauses.

  Attributes:
    train_seconds: over all starts of the run, up to the last `read`.
  """

  def __init__(self, train_seconds: float = 0.0):
    self.train_seconds = train_seconds
    self._mark = time.monotonic()
    self._paused = 0.0
    self._waiting = 0.0
    self._steps = 0

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Time in here is not training time."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._paused += _since(begin)

  @contextlib.contextmanager
  def wait(self) -> Iterator[None]:
    """Time in here is training time spent on data."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._waiting += _since(begin)

  def step(self) -> None:
    """Counts one step."""
    self._steps += 1

  def read(self) -> Interval:
    """What happened since the last call."""
    now = time.monotonic()
    seconds = max(now - self._mark - self._paused, 1e-9)
    waiting = min(self._waiting, seconds)
    interval = Interval(self._steps, seconds, waiting)
    self.train_seconds += seconds
    self._mark, self._paused, self._waiting, self._steps = now, 0.0, 0.0, 0
    return interval


def _since(begin: float) -> float:
  """Seconds; never below 0, whatever a machine does to its clock."""
  return max(0.0, time.monotonic() - begin)
