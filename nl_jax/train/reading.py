"""Each process reads a checkpoint by itself, and all agree on what came of it.

Orbax would have them wait for each other after every reading: where a file is
damaged that one process alone reads, it would take an older checkpoint and the
others would not.
"""

import asyncio
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nl_jax.train import files

T = TypeVar("T")
# What orbax and tensorstore raise for files that are torn, gone or garbled.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
_TOKEN = "token"
_PATIENCE = 10.0  # Seconds.


class _ToTheEnd(ocp.type_handlers.ArrayHandler):
  """Where one array cannot be read, ends the reading of the others first.

  Orbax closes its event loop at the first error. Reads still under way would
  then report to a loop that is closed, and their coroutines raise once more
  when they are collected as garbage, each with a traceback on stderr.
  """

  async def deserialize(
    self,
    infos: Sequence[ocp.type_handlers.ParamInfo],
    args: Sequence[ocp.RestoreArgs] | None = None,
  ) -> Sequence[jax.Array]:
    before = asyncio.all_tasks()
    try:
      return await super().deserialize(infos, args)
    finally:
      # Held by no name: an error keeps the names here, and tasks arrays.
      await asyncio.gather(
        *(asyncio.all_tasks() - before), return_exceptions=True
      )


def arrays(folder: pathlib.Path, like: Any) -> Any:
  """Reads arrays, of one item of a checkpoint; waits for no other process.

  Args:
    folder: of the item.
    like: which of its arrays: a tree of `jax.ShapeDtypeStruct`, whose shardings
      are those of the result.

  Raises:
    Exception: one of `DAMAGE`, or one of no type that is caused by it.
  """
  here = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=here,
    active_processes={here},
    barrier_sync_key_prefix=f"reader_{here}",
  )
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, _ToTheEnd())
    ),
    multiprocessing_options=options,
  )
  args = ocp.args.PyTreeRestore(
    item=like,
    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
    partial_restore=True,
  )
  with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
    return reader.restore(folder, args=args)


def agreed(read: Callable[[], T]) -> T:
  """What `read()` gives; where it fails on one process, it fails on all.

  Args:
    read: has no part that processes do together; all call.

  Raises:
    ValueError: it failed on another process.
    Exception: one of `DAMAGE`, where it failed here.
  """
  found: Any = None
  error = None
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


def of_first(number: int) -> int:
  """The number that process 0 has; all processes call it."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_shared(workdir: pathlib.Path) -> None:
  """Finds that a process does not see the folder that process 0 writes to.

  Args:
    workdir: exists on process 0; all processes call.

  Raises:
    ValueError: on all processes, where one does not see it.
  """
  if jax.process_count() == 1:
    return
  mine = np.int32(time.time_ns() % 2**31)
  token = str(multihost_utils.broadcast_one_to_all(mine))
  path = workdir / _TOKEN
  if jax.process_index() == 0:
    files.replace(path, token)
  multihost_utils.sync_global_devices("token written")
  sees = _has(path, token)
  sees_P = multihost_utils.process_allgather(np.int32(sees))
  if jax.process_index() == 0:
    path.unlink()
  if not sees_P.all():
    raise ValueError(
      f"process {sees_P.argmin()} does not see what process 0 writes to "
      f"{workdir}; give a --workdir on a disk that all hosts share"
    )


def _has(path: pathlib.Path, text: str) -> bool:
  """Whether a file holds a text, now or soon: shared disks take their time."""
  deadline = time.monotonic() + _PATIENCE
  while not (path.is_file() and path.read_text(encoding="utf-8") == text):
    if time.monotonic() > deadline:
      return False
    time.sleep(0.1)
  return True


def is_of_others(error: object) -> bool:
  """Whether what processes do together failed since one is gone."""
  known = ("Gloo", "oordination", "unhealthy", "arrier")
  return (
    jax.process_count() > 1
    and isinstance(error, jax.errors.JaxRuntimeError)
    and any(word in str(error) for word in known)
  )


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
  """Where one array of many is torn, orbax raises an Exception of no type."""
  try:
    yield
  except Exception as error:
    if type(error) is not Exception or not isinstance(error.__cause__, DAMAGE):
      raise
    raise error.__cause__ from None
