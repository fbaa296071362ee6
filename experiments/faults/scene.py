"""A run that a fault is done to: its starts, the moment, what it said.

A scene has a workdir of its own. Its starts are processes of
`experiments.faults.run`, one after the other.
"""

import contextlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from experiments.faults import judge
from nl_jax.train import checkpoint, files, metrics

STEPS, EVERY = 40, 4
HEALTHY = -1  # No batch is poisoned.
_ROOT = pathlib.Path(__file__).parents[2]
_PATIENCE = 300.0  # Seconds; a start that takes longer hangs.
_POLL = 0.002
_stopped = threading.Event()
_alive: set["Start"] = set()
_FROM = re.compile(r"^going on from step (\d+) in ", re.M)


class WrongError(AssertionError):
  """A run did what it must not; the message says what."""


class StoppedError(Exception):
  """The command ends: no more starts."""


class MissedError(Exception):
  """A run was done before the moment of its fault came."""


class Pace(NamedTuple):
  """How fast a run is that nothing is done to.

  Attributes:
    start: seconds from the command to the first line of metrics.
    step: seconds from a line to the next.
    end: seconds from the last step to the end of the command.
  """

  start: float
  step: float
  end: float


class Mark(NamedTuple):
  """What a run had when a fault was done to it.

  Attributes:
    time: seconds since 1970.
    step: of the last line of metrics.
    promised: the newest checkpoint that was whole; 0: none was.
  """

  time: float
  step: int
  promised: int


class Ended(NamedTuple):
  """How a start ended.

  Attributes:
    status: of the process; below 0: the signal that killed it.
    said: its stderr.
    begun: seconds since 1970.
    seconds: that it took.
  """

  status: int
  said: str
  begun: float
  seconds: float


class Start:
  """One process that trains."""

  def __init__(self, arguments: list[str], poison: int):
    """Args: flags of `experiments.lm`, and the batch that is not finite."""
    if _stopped.is_set():
      raise StoppedError
    self._begun, self._mark = time.time(), time.monotonic()
    self.process = subprocess.Popen(
      [sys.executable, "-m", "experiments.faults.run", str(poison)]
      + arguments,
      cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True, errors="replace",
      start_new_session=True,  # Ctrl-C on this command is not for it.
    )  # fmt: skip
    # A pipe: a file could not be written on a disk that is full.
    self._said: list[str] = []
    read = lambda: self._said.append(self.process.stderr.read())
    self._reader = threading.Thread(target=read, daemon=True)
    self._reader.start()
    _alive.add(self)

  def wait(self) -> Ended:
    """Waits for the end.

    Raises:
      WrongError: it does not come.
    """
    try:
      status = self.process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      raise WrongError(f"hangs: no end after {_PATIENCE:.0f} s") from None
    self._reader.join()
    seconds = time.monotonic() - self._mark
    return Ended(status, "".join(self._said), self._begun, seconds)

  def close(self) -> None:
    """Kills it where it still runs."""
    if self.process.poll() is None:
      self.process.kill()
      self.process.wait()
    self._reader.join()
    _alive.discard(self)


def stop() -> None:
  """Kills all starts, and lets none begin."""
  _stopped.set()
  for start in list(_alive):
    start.process.kill()


class Scene:
  """One run with its starts, and what was done to it.

  Attributes:
    workdir: of the run.
    corpus: the folder of its text and shards.
    rng: decides what the plan leaves open.
    marks: one for each blow.
    ended: starts that ended.
    done: what was done, in words.
    sentences: errors that the starts ended with.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    corpus: pathlib.Path,
    arguments: list[str],
    pace: Pace,
    rng: np.random.Generator,
  ):
    self.workdir, self.corpus, self.rng = folder / "run", corpus, rng
    self._arguments = [*arguments, f"--workdir={self.workdir}"]
    self._pace = pace
    self.marks: list[Mark] = []
    self.ended: list[Ended] = []
    self.done: list[str] = []
    self.sentences: list[str] = []

  @contextlib.contextmanager
  def start(self, poison: int = HEALTHY, *more: str) -> Iterator[Start]:
    """A start of the run; it does not outlive the context."""
    start = Start([*self._arguments, *more], poison)
    try:
      yield start
    finally:
      start.close()

  def reach(self, start: Start, least: int = 0) -> None:
    """Waits for a random moment of a start, and marks it.

    Args:
      start: the process.
      least: not before this step was logged.

    Raises:
      MissedError: the run was done before.
    """
    rng, pace = self.rng, self._pace
    kinds = ["start", "step", "step", "save", "save", "end"]
    kind = kinds[int(rng.integers(1 if least else 0, len(kinds)))]
    if kind == "start":
      limit = time.monotonic() + rng.uniform(0, pace.start)
      said, come = kind, lambda: time.monotonic() > limit
    elif kind == "step":
      step = int(rng.integers(max(1, least), STEPS))
      said, come = f"step {step}", lambda: last_line(self.workdir) >= step
    elif kind == "save":
      step = EVERY * int(rng.integers(1 + least // EVERY, 1 + STEPS // EVERY))
      said, come = f"save of step {step}", lambda: self._saves(step)
    else:
      said, come = "end", lambda: last_line(self.workdir) == STEPS
    self._await(start, come)
    if kind != "start":
      spread = {"step": 2 * pace.step, "save": 0.1, "end": pace.end / 2}
      time.sleep(rng.uniform(0, spread[kind]))
    if start.process.poll() is not None:
      raise MissedError
    self.done.append(f"at {said}")
    self.mark()

  def _saves(self, step: int) -> bool:
    """Whether a save was begun, or one after it."""
    folder = self.workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    numbers = [name.partition(".")[0] for name in names]
    return any(n.isdigit() and int(n) >= step for n in numbers)

  def _await(self, start: Start, come: Callable[[], bool]) -> None:
    limit = time.monotonic() + _PATIENCE
    while not come():
      if start.process.poll() is not None:
        raise MissedError
      if time.monotonic() > limit:
        raise WrongError(f"hangs: nothing happened for {_PATIENCE:.0f} s")
      time.sleep(_POLL)

  def mark(self) -> None:
    """Notes what the run has now."""
    # Read before: what is whole now must be there later.
    promised = checkpoint.latest_step(str(self.workdir)) or 0
    self.marks.append(Mark(time.time(), last_line(self.workdir), promised))

  def blow(self, start: Start, number: signal.Signals, least: int = 0) -> None:
    """Sends a signal at a random moment."""
    self.reach(start, least)
    start.process.send_signal(number)
    self.done.append(number.name)

  def end(self, start: Start, statuses: tuple[int, ...]) -> Ended:
    """Waits for the end of a start, and looks at how it ended.

    Raises:
      WrongError: with another status, with a traceback, or with status 1 and
        not one sentence.
    """
    ended = start.wait()
    self.ended.append(ended)
    sentence = judge.sentence(ended.said)
    if ended.status not in statuses:
      raise WrongError(
        f"ended with status {ended.status}, expected one of {statuses}"
      )
    if "Traceback" in ended.said and not self._pythons(ended):
      raise WrongError("printed a traceback")
    if ended.status == 1 and not sentence:
      raise WrongError("ended with status 1, and not with one sentence")
    if sentence:
      self.sentences.append(sentence)
    return ended

  def _pythons(self, ended: Ended) -> bool:
    """Whether Python itself answered Ctrl-C: no command yet, or one done."""
    before, _, trace = ended.said.partition("Traceback")
    outside = not before.strip() or self.is_done
    return outside and "KeyboardInterrupt" in trace

  @property
  def is_done(self) -> bool:
    """Whether the run has its results."""
    return (self.workdir / files.RESULTS).exists()


def last_line(workdir: pathlib.Path) -> int:
  """The step of the last whole line of metrics; 0 where there is none."""
  lines = read_lines(workdir)
  return lines[-1]["step"] if lines else 0


def read_lines(workdir: pathlib.Path) -> list[dict]:
  """The whole lines of metrics."""
  path = workdir / metrics.FILE
  if not path.exists():
    return []
  *lines, torn = path.read_text(encoding="utf-8").split("\n")
  del torn
  return [json.loads(line) for line in lines]


def begun_at(said: str) -> int:
  """The step that a start says it resumes from; 0: from the beginning."""
  found = _FROM.findall(said)
  return int(found[-1]) if found else 0
