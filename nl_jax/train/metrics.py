"""Metrics of a run: `metrics.jsonl`, and TensorBoard events beside it.

One JSON object a line with `step`, `tokens`, `wall_time` (seconds since 1970)
and the metrics; null for what is not finite. On resume the file is cut back to
the checkpoint's step, so that it reads like that of a run never stopped.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from nl_jax.train import files

FILE = files.METRICS
EVENTS = "events"
HEADER = ("step", "tokens", "wall_time")


class Writer:
  """Writes the metrics of one run; a context manager.

  Attributes:
    last: the last value of each metric, those before a resume included.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    step: int | None = None,
    since: tuple[int, int] = (0, 0),
    tokens_per_step: int = 1,
    enabled: bool = True,
  ):
    """Opens both files.

    Args:
      workdir: of the run.
      step: of the checkpoint gone on from; None: a run from its beginning.
      since: step and tokens seen when this start of the run begins.
      tokens_per_step: slots of a batch from now on, padding included.
      enabled: False on all processes but one: nothing is written.
    """
    self.last: dict[str, float] = {}
    self._since = since
    self._tokens_per_step = tokens_per_step
    self._enabled = enabled
    if not enabled:
      return
    self._path = workdir / FILE
    for line in cut_back(self._path, -1 if step is None else step):
      self._remember(line)
    with files.writing(self._path):
      (workdir / EVENTS).mkdir(exist_ok=True)
      self._file = self._path.open("a", encoding="utf-8")
      # Not SummaryWriter: a disk that is full ends its thread, and the run
      # would wait for it for ever.
      self._events = event_file_writer.EventsWriter(
        str(workdir / EVENTS / "events"),
        f".{step or 0}",  # Names count in seconds.
      )
      # Events of steps from there on are not shown any more.
      log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      begin = 0 if step is None else step + 1
      self._add(event_pb2.Event(step=begin, session_log=log))

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *error: object) -> None:
    if not self._enabled:
      return
    with files.writing(self._path):
      try:
        self._file.close()
      finally:
        self._events.close()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a line.

    Args:
      step: updates made so far.
      values: by name.

    Raises:
      StorageError: the disk is full, or gone.
    """
    first, seen = self._since
    tokens = seen + (step - first) * self._tokens_per_step
    now = round(time.time(), 3)
    line: dict[str, Any] = {"step": step, "tokens": tokens, "wall_time": now}
    line |= {name: _number(value) for name, value in values.items()}
    self._remember(line)
    if not self._enabled:
      return
    with files.writing(self._path):
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
      for name, value in values.items():
        scalar = summary.scalar(name, value)
        self._add(event_pb2.Event(step=step, summary=scalar))

  def sync(self) -> None:
    """Waits until the lines are on disk: before a checkpoint of their step."""
    if self._enabled:
      with files.writing(self._path):
        os.fsync(self._file.fileno())
        self._events.flush()

  def _add(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    self._events.write_event(event)

  def _remember(self, line: Mapping[str, Any]) -> None:
    self.last |= {k: v for k, v in line.items() if k not in HEADER}


def cut_back(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
  """Removes the lines after a step, and torn ones; returns what is left.

  The file is replaced as a whole: killed at any moment, it is the old or the
  new one.
  """
  found = lines(path) if path.exists() else []
  kept = [line for line in found if line and line["step"] <= step]
  files.replace(path, "".join(json.dumps(line) + "\n" for line in kept))
  return kept


def lines(path: pathlib.Path) -> list[dict[str, Any] | None]:
  """The lines of a run; None for one that is torn or damaged."""
  return [_parse(text) for text in path.read_bytes().splitlines()]


def _parse(text: bytes) -> dict[str, Any] | None:
  try:
    line = json.loads(text)
  except (ValueError, RecursionError):
    return None
  is_whole = isinstance(line, dict) and all(
    is_number(line.get(key)) for key in HEADER
  )
  return line if is_whole and type(line["step"]) is int else None


def is_number(value: Any) -> bool:
  """Whether a value is one that a line may have; -2**63 to 2**63 and no NaN."""
  return type(value) in (int, float) and abs(value) < 2**63


def _number(value: float) -> float | None:
  value = float(value)
  if not math.isfinite(value):
    return None
  return int(value) if value.is_integer() and abs(value) < 2**53 else value
