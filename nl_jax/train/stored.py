"""What a checkpoint on a disk says: listed, read, and found to be whole.

Nothing is changed here. A step is taken where its parts are of one step and to
the last bit what was saved; others are damage, and an older one is looked for.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from nl_jax import files as whole
from nl_jax import formats, sharding
from nl_jax.train import files, reading, seal

T = TypeVar("T")
_STEP = re.compile("0|[1-9][0-9]*")  # The name of a checkpoint.


class Restored(NamedTuple):
  """One checkpoint.

  Attributes:
    step: its number, updates made.
    state: the training state.
    data: state of the data iterator.
    meta: what `Checkpoints.save` was given, and what seals the rest.
  """

  step: int
  state: Any
  data: Any
  meta: dict[str, Any]


class StepMismatchError(ValueError):
  """A checkpoint whose parts are of different steps, or that was not taken."""


class LeavesMismatchError(ValueError):
  """A checkpoint of another model or optimizer."""


# What is whole, and all the same cannot be gone on from.
OTHERS = (LeavesMismatchError, formats.FormatError)


def newest(
  workdir: pathlib.Path, read: Callable[[int], T]
) -> tuple[T | None, dict[int, Exception]]:
  """What reading the newest step gives, and the errors of those after it.

  Beside a run under way steps come and go: those that went are not damage, and
  those that came are newer.
  """
  errors: dict[int, Exception] = {}
  found = None
  while True:
    left = [step for step in listed(workdir) if step not in errors]
    step = reading.of_first(left[-1] if left else -1)
    if step < 0:
      break
    try:
      found = read(step)
      break
    except OTHERS:
      raise
    except reading.DAMAGE as error:
      errors[step] = error
  there = listed(workdir)
  return found, {k: e for k, e in errors.items() if k in there}


def unreadable(
  folder: pathlib.Path, damaged: Mapping[int, Exception]
) -> ValueError:
  """What to raise where there are checkpoints and none can be read."""
  return ValueError(
    f"no checkpoint in {folder} can be read (steps {sorted(damaged)}; "
    f"{first_line(damaged[max(damaged)])}); move the workdir away to start "
    "from the beginning"
  )


def read(
  folder: pathlib.Path, step: int, like: Any, without: str = ""
) -> Restored:
  """One checkpoint, whole and as it was saved.

  Args:
    folder: of all checkpoints.
    step: which.
    like: the abstract state.
    without: a branch of the state that is not read, whether or not it is there.
  """
  read = lambda: _read_items(folder, step, like, without)
  meta, state, data = reading.agreed(read)
  check_step(step, state)
  seal.check_sums(state, meta)
  if data != meta.get("data", data):
    raise whole.BrokenSealError("its place in the data is not what was saved")
  return Restored(step, state, _place(data, meta), meta)


def _read_items(
  folder: pathlib.Path, step: int, like: Any, without: str
) -> tuple[dict[str, Any], Any, Any]:
  """`meta`, the state and the place in the data."""
  # Read first: a mismatch must not look like damage.
  meta = read_meta(folder, step)
  check_leaves(step, left(meta["leaves"], without), describe_leaves(like))
  data = json_of(folder, step, "data")
  state = reading.arrays(folder / str(step) / "state", like)
  return meta, state, data


def _place(data: Any, meta: Mapping[str, Any]) -> Any:
  """The place in the data, in rows; once it was counted in batches."""
  if "next_index" not in data:
    return data
  return {"next_row": data["next_index"] * meta["batch_size"]}


def describe_leaves(state: Any) -> dict[str, str]:
  """{path: "float32[2,3]"} of a state or its shapes."""
  return {
    sharding.path_name(path): f"{x.dtype}{list(x.shape)}"
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


def left(leaves: Mapping[str, str], without: str) -> dict[str, str]:
  """Leaves but those of a branch."""
  branch = f"{without}/"
  return {k: x for k, x in leaves.items() if not k.startswith(branch)}


def check_leaves(
  step: int, saved: Mapping[str, str], expected: Mapping[str, str]
) -> None:
  """Raises LeavesMismatchError; orbax would cast dtypes in silence."""
  names = sorted({*saved, *expected})
  wrong = [
    f"{name} is {saved.get(name, 'missing')}, expected "
    f"{expected.get(name, 'nothing')}"
    for name in names
    if saved.get(name) != expected.get(name)
  ]
  if wrong:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise LeavesMismatchError(
      f"the checkpoint of step {step} is of another model or optimizer: "
      f"{'; '.join(wrong[:5])}{more}; give the config it was made with"
    )


def check_step(step: int, state: Mapping[str, Any]) -> None:
  """Raises StepMismatchError for a step that was copied to another's name."""
  found = int(state["step"])
  if found != step:
    raise StepMismatchError(
      f"the checkpoint of step {step} holds a state of step {found}"
    )


def first_line(error: Exception) -> str:
  """Of an error's message, and its type."""
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def listed(workdir: pathlib.Path) -> list[int]:
  """Steps of the checkpoints, oldest first."""
  folder = workdir / files.CHECKPOINTS
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in folder.iterdir()
    if _STEP.fullmatch(path.name) and path.is_dir()
  )


def folder_of(workdir: str) -> pathlib.Path:
  """Of the checkpoints of a workdir."""
  return pathlib.Path(workdir).resolve() / files.CHECKPOINTS


def one(workdir: str, step: int, read: Callable[[int], T]) -> T:
  """What reading one step gives.

  Raises:
    ValueError: it is not there, or cannot be read.
  """
  check_there(workdir, step)
  try:
    return read(step)
  except OTHERS:
    raise
  except reading.DAMAGE as error:
    raise unreadable(folder_of(workdir), {step: error}) from error


def check_there(workdir: str, step: int | None) -> None:
  """Raises ValueError where there is no checkpoint, or not this one."""
  steps = listed(pathlib.Path(workdir))
  if not steps:
    raise no_checkpoint(workdir)
  if step is not None and step not in steps:
    raise ValueError(
      f"no checkpoint of step {step} in {workdir}; there are {steps}"
    )


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
  """The item `meta` of a checkpoint, whole and of a format that is read."""
  values = whole.unsealed(json_of(folder, step, "meta"), "its meta")
  files.check_format(folder / str(step), "a checkpoint", values)
  return values


def json_of(folder: pathlib.Path, step: int, item: str) -> Any:
  """The JSON values of an item of a checkpoint, read without a manager."""
  path = folder / str(step) / item / "metadata"
  return json.loads(path.read_text(encoding="utf-8"))


def no_checkpoint(workdir: str) -> ValueError:
  """What to raise where there is none."""
  return ValueError(
    f"no checkpoint in {workdir}: train first, or give another workdir"
  )
