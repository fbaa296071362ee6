"""The workers of experiments.prepare: processes that make shards."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.cli import command
from nl_jax import files
from nl_jax.data import partition, preparation

_READ = 0.2  # Seconds between two looks at what the workers have done.
_TELL = 10.0  # Seconds between two lines, where there is no terminal.
_done: Any = None  # Of a worker: bytes that all of them have done.
_stopped: Any = None  # Of a worker: whether it is to end.


class Made(NamedTuple):
  """What a preparation did.

  Attributes:
    manifest: of the corpus.
    shards: of the corpus.
    made: shards made now; the others were there.
    bytes: of their input.
    workers: who made them, in words.
  """

  manifest: dict[str, Any]
  shards: int
  made: int
  bytes: int
  workers: str


def make(settings: partition.Settings, out: str, asked: int) -> Made:
  """Prepares a corpus by processes of this machine.

  Args:
    settings: of the corpus.
    out: the folder, made if missing.
    asked: number of workers; 0: one a core.

  Raises:
    ValueError: settings that do not fit, or what a worker raised.
    ChildProcessError: a worker was killed.
  """
  folder = files.expand(out)
  tokenizer = preparation.check(settings)
  about = preparation.claim(settings, tokenizer)
  jobs = [
    preparation.Job(i, pieces, settings, str(folder))
    for i, pieces in enumerate(partition.plan(settings))
  ]
  workers = size(asked, jobs)
  command.say(
    f"{_bytes(jobs):,} bytes in {len(jobs)} shards, {workers} workers"
  )
  preparation.open_folder(folder, about)
  with preparation.lock(folder):
    made = run(jobs, _bytes(jobs), workers)
    manifest = preparation.finish(folder, settings, about, tokenizer, len(jobs))
  done = _bytes([jobs[i] for i in made])
  return Made(manifest, len(jobs), len(made), done, f"{workers} workers")


def _bytes(jobs: list) -> int:
  return sum(piece.size for job in jobs for piece in job.pieces)


def size(asked: int, jobs: list) -> int:
  """Number of workers: as asked, or one a core, and none without a job."""
  return min(asked or len(os.sched_getaffinity(0)), len(jobs))


def run(jobs: list, total: int, workers: int) -> list[int]:
  """Makes all shards, with a bar.

  Args:
    jobs: of `preparation`.
    total: bytes of all.
    workers: number of processes.

  Returns:
    Numbers of the shards made now; the others were there.

  Raises:
    ValueError: what a worker raised.
    ChildProcessError: a worker was killed.
  """
  # Spawned: a fork would carry threads of libraries along.
  context = multiprocessing.get_context("spawn")
  done, stopped = context.Value("q", 0), context.Value("b", 0)
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, context, initializer=_begin, initargs=(done, stopped)
  )
  try:
    with _deaf():
      futures = [pool.submit(_work, job) for job in jobs]
    with _Bar(total) as show:
      waiting = set(futures)
      while waiting:
        finished, waiting = concurrent.futures.wait(
          waiting, _READ, concurrent.futures.FIRST_EXCEPTION
        )
        show(done.value)
        for future in finished:
          future.result()
  except (ValueError, OSError) as error:
    raise ValueError(str(error)) from error  # Said here, not in the worker.
  except concurrent.futures.process.BrokenProcessPool as error:
    raise ChildProcessError(
      "a worker was killed, perhaps for lack of memory; start the same command "
      "again, with fewer --workers: it resumes"
    ) from error
  finally:
    stopped.value = 1
    pool.shutdown(wait=True, cancel_futures=True)
  return [job.number for job, future in zip(jobs, futures) if future.result()]


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
  """Processes begun here never hear Ctrl-C: their parent tells them."""
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def _begin(done: Any, stopped: Any) -> None:
  """Of a worker, before its first job."""
  global _done, _stopped
  _done, _stopped = done, stopped
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A worker of a killed command would write beside the next start's."""
  multiprocessing.parent_process().join()
  os._exit(1)


def _work(job: Any) -> bool:
  def advance(size: int) -> None:
    if _stopped.value:
      raise InterruptedError("the command was stopped")
    with _done.get_lock():
      _done.value += size

  return preparation.run_job(job, advance)


class _Bar:
  """A progress bar on a terminal; elsewhere a line now and then."""

  def __init__(self, size: int):
    import rich.console
    import rich.progress

    self._size, self._told = size, time.monotonic()
    self._plain = not sys.stderr.isatty()
    console = rich.console.Console(stderr=True)
    self._bar = rich.progress.Progress(
      rich.progress.BarColumn(),
      rich.progress.DownloadColumn(),
      rich.progress.TransferSpeedColumn(),
      rich.progress.TimeRemainingColumn(),
      console=console,
      disable=self._plain,
    )
    self._task = self._bar.add_task("", total=size)

  def __enter__(self) -> Any:
    self._bar.start()
    return self._show

  def _show(self, done: int) -> None:
    self._bar.update(self._task, completed=done)
    if self._plain and time.monotonic() - self._told > _TELL:
      self._told = time.monotonic()
      command.say(f"{done:,} of {self._size:,} bytes")

  def __exit__(self, *error: object) -> None:
    self._bar.stop()
