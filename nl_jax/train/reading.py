"""Each process reads a checkpoint by itself, and all agree on what came of it.

Orbax would have them wait for each other after every reading: where a file is
damaged that one process alone reads, it would go on to an older checkpoint and
the others would not.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

T = TypeVar("T")
# What orbax and tensorstore raise for files that are torn, gone or garbled.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)


def reader(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
  """A checkpointer that waits for no other process; it only reads."""
  here = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=here,
    active_processes={here},
    barrier_sync_key_prefix=f"reader_{here}",
  )
  return ocp.Checkpointer(handler, multiprocessing_options=options)


def agreed(read: Callable[[], T]) -> T:
  """What `read()` gives; where it fails on one process, it fails on all.

  Args:
    read: has no part that processes do together; all call.

  Raises:
    ValueError: it failed on another process.
    Exception: one of `DAMAGE`, where it failed here.
  """
  found, error = None, None
  try:
    with _damage_told():
      found = read()
  except DAMAGE as e:
    error = e
  failed = np.array([error is not None])
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(failed[0])
  if error is not None:
    raise error
  if failed.any():
    raise ValueError(f"process {failed.argmax()} cannot read it")
  return found


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
  """Where one array of many is torn, orbax raises an Exception of no type."""
  try:
    yield
  except Exception as error:
    if type(error) is not Exception or not isinstance(error.__cause__, DAMAGE):
      raise
    raise error.__cause__ from None
