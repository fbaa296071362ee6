"""A trace of some steps, for xprof: what host and devices did, op by op.

Names in it are those of `jax.named_scope`: mixer, memories, levels, optimizer.
Step n is the update that leads to state n, as in `metrics.jsonl`.
"""

import pathlib

import jax
from absl import logging

from nl_jax.train import files
from nl_jax.train import options as options_lib

FOLDER = "profile"


class Profile:
  """Writes the trace of one start of a run; a context manager.

  Only process 0 traces, since its devices do what all do; but all ask when it
  begins and ends, for all look at their metrics then.
  """

  def __init__(
    self, steps: options_lib.Steps | None, folder: pathlib.Path, start: int
  ):
    """What to trace.

    Args:
      steps: of `options_lib.parse_steps`.
      folder: of the run; the trace goes to its `profile/`.
      start: updates made before; a trace that begins earlier is not made.
    """
    self._steps = steps if steps and start < steps.first else None
    self._folder = folder / FOLDER
    self._on = False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *error: object) -> None:
    if not self._on:
      return
    try:  # The run ended inside.
      self.end()
    except files.StorageError as failed:
      if error[0] is None:
        raise
      logging.warning("%s", failed)  # The error of the run follows.

  def begins(self, step: int) -> bool:
    """Whether the trace begins at state `step`."""
    return self._steps is not None and step == self._steps.first - 1

  def ends(self, step: int) -> bool:
    """Whether the trace ends at state `step`."""
    return self._on and self._steps is not None and step == self._steps.last

  def begin(self) -> str:
    """Starts to trace; says so.

    Raises:
      StorageError: the folder cannot be made.
    """
    if jax.process_index() == 0:
      with files.writing(self._folder):
        self._folder.mkdir(exist_ok=True)
      options = jax.profiler.ProfileOptions()
      # Calls of Python would be most of the file, and slow what is measured.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._folder, profiler_options=options)
    self._on = True
    assert self._steps is not None  # It `begins`.
    return f"tracing steps {self._steps.first} to {self._steps.last}"

  def end(self) -> str:
    """Writes the trace; says where it is.

    Raises:
      StorageError: it cannot be written.
    """
    self._on = False
    if jax.process_index() == 0:
      try:
        jax.profiler.stop_trace()
      except jax.errors.JaxRuntimeError as failed:
        raise files.StorageError.of(self._folder, failed) from failed
    return f"traced; to look at it: xprof --logdir={self._folder}"
