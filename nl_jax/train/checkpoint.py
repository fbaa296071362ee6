"""Checkpoints: state, place in the data, and what a run must know of itself.

Three items a step: `state` (arrays), `data` (the iterator's state, integers)
and `meta` (JSON). Writing goes on in the background; a step that is not whole
is not listed. A listed step that cannot be read, or is not what was saved, is
moved aside, and the one before it taken.
"""

import contextlib
import json
import logging as std_logging
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from nl_jax import formats, sharding
from nl_jax.train import files, reading, seal

_ITEMS = ("state", "data", "meta")
_DAMAGED = "damaged"
_STEP = re.compile("0|[1-9][0-9]*")  # The name of a checkpoint.
# What they raise where the disk is full or gone.
_REFUSED = (ValueError, OSError, jax.errors.JaxRuntimeError)


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
_OTHERS = (LeavesMismatchError, formats.FormatError)


def _readable(record: std_logging.LogRecord) -> bool:
  """False for what orbax tells of its own work, dozens of lines a save.

  What a user must know of it is said here, or raised.
  """
  abandoned = "exception was never retrieved" in str(record.msg)
  return "/orbax/" not in record.pathname and not abandoned


def _hush() -> None:
  """Keeps the traces of abandoned writes off stderr, for good.

  When one array cannot be written, orbax closes its event loop: the others
  then fail to report to it, each with a traceback, even after it was closed.
  """
  logging.get_absl_logger().addFilter(_readable)
  std_logging.getLogger("asyncio").addFilter(_readable)
  before = sys.unraisablehook
  if getattr(before, "hushes_late_writes", False):
    return

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  hook.hushes_late_writes = True
  sys.unraisablehook = hook


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for writes."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    keep: int = 3,
    keep_period: int = 0,
    read_only: bool = False,
  ):
    """Opens the folder `checkpoints` of a workdir, made if missing.

    Args:
      workdir: of the run.
      keep: newest checkpoints that stay.
      keep_period: those of its multiples stay too; 0: none does.
      read_only: nothing is made, moved or removed.
    """
    _hush()
    self._folder = workdir.resolve() / files.CHECKPOINTS
    self._aside = workdir.resolve() / _DAMAGED
    self._begun, self._read_only = 0, read_only
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_period or None,
      create=not read_only,
      enable_async_checkpointing=True,
      # Left by a run killed while it saved.
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    with files.writing(self._folder):
      self._manager = ocp.CheckpointManager(
        self._folder, options=options, item_names=_ITEMS
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    if kind and reading.is_of_others(error[0]):
      return  # A write in flight waits for a process that is gone.
    try:
      # Leaving with a write in flight would lose it.
      with self._writing():
        self._manager.close()
    except files.StorageError:
      # What ended the run has been told.
      if kind is None:
        raise

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Errors of the writer, of the checkpoint begun last, as a sentence."""
    try:
      yield
    except (StepMismatchError, files.StorageError):
      raise
    except _REFUSED as error:
      if reading.is_of_others(error):
        raise
      full = "No space left on device"
      reason = full if full in str(error) else _first_line(error)
      path = self._folder / str(self._begun)
      raise files.StorageError.of(path, reason) from error

  def save(
    self, step: int, state: Any, data: Any, meta: Mapping[str, Any]
  ) -> None:
    """Begins to write a checkpoint; errors of the last one are raised here.

    Args:
      step: updates made.
      state: the training state; may be donated when this returns.
      data: state of the iterator before the next batch is drawn.
      meta: JSON values.

    Raises:
      StepMismatchError: there is a checkpoint of this step or a later one.
      StorageError: this one or the last one cannot be written.
    """
    about = {
      "format": files.FORMAT,
      "leaves": describe_leaves(state),
      seal.SUMS: seal.sums(state),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(seal.close({**meta, **about, "data": data})),
    )
    latest = self._manager.latest_step()
    with self._writing():
      # Forced: otherwise a save is dropped while the one before is written.
      taken = (latest is None or step > latest) and self._manager.save(
        step, args=args, force=True
      )
      self._begun = step
    if not taken:
      raise StepMismatchError(
        f"{self._folder} did not take a checkpoint of step {step}: its latest "
        f"is {latest}"
      )

  def check(self) -> None:
    """Raises the StorageError of a write in the background, if any."""
    with self._writing():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until what was saved is on disk; StorageError where it is not."""
    with self._writing():
      self._manager.wait_until_finished()

  def preempted(self, step: int) -> bool:
    """Whether some process was told to stop; the same answer on all."""
    return self._manager.reached_preemption(step)

  def restore(self, like: Any) -> Restored | None:
    """The newest checkpoint that can be read; None where there is none.

    Steps that cannot be read are moved to the folder `damaged` of the workdir
    with a warning, once an older one was read.

    Args:
      like: the abstract state; its shardings are those of the result.

    Raises:
      LeavesMismatchError: the checkpoint is of another model or optimizer.
      FormatError: it is of a format that this version does not read.
      ValueError: there are checkpoints and none can be read.
    """
    damaged: dict[int, Exception] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self._read(step, like)
      except _OTHERS:
        raise
      except reading.DAMAGE as error:
        damaged[step] = error
        continue
      self._set_aside(damaged, step)
      return restored
    if damaged:
      raise ValueError(
        f"no checkpoint in {self._folder} can be read (steps "
        f"{sorted(damaged)}; {_first_line(damaged[max(damaged)])}); move the "
        "workdir away to start from the beginning"
      )
    return None

  def _read(self, step: int, like: Any) -> Restored:
    read = lambda: self._read_items(step, like)
    meta, state, data = reading.agreed(read)
    _check_step(step, state)
    seal.check_sums(state, meta)
    if data != meta.get("data", data):
      raise seal.BrokenSealError("its place in the data is not what was saved")
    return Restored(step, state, data, meta)

  def _read_items(
    self, step: int, like: Any
  ) -> tuple[dict[str, Any], Any, Any]:
    """`meta`, the state and the place in the data."""
    # Read first: a mismatch must not look like damage.
    meta = _meta(self._folder, step)
    _check_leaves(step, meta["leaves"], describe_leaves(like))
    data = _json(self._folder, step, "data")
    state = reading.arrays(self._folder / str(step) / "state", like)
    return meta, state, data

  def _set_aside(self, damaged: Mapping[int, Exception], good: int) -> None:
    """Moves unreadable steps away: orbax takes no step before its latest."""
    if not damaged:
      return
    where = "passed over" if self._read_only else f"moved to {self._aside}"
    for step, error in damaged.items():
      logging.warning(
        "checkpoint of step %d cannot be read (%s); %s, going on from step %d",
        step,
        _first_line(error),
        where,
        good,
      )
    if self._read_only:
      return
    if jax.process_index() == 0:
      self._aside.mkdir(exist_ok=True)
      for step in damaged:
        (self._folder / str(step)).rename(_free_name(self._aside, step))
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices("damaged checkpoints")
    self._manager.reload()


def describe_leaves(state: Any) -> dict[str, str]:
  """{path: "float32[2,3]"} of a state or its shapes."""
  return {
    sharding.path_name(path): f"{x.dtype}{list(x.shape)}"
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


def _check_leaves(
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


def _check_step(step: int, state: Mapping[str, Any]) -> None:
  """Raises StepMismatchError for a step that was copied to another's name."""
  found = int(state["step"])
  if found != step:
    raise StepMismatchError(
      f"the checkpoint of step {step} holds a state of step {found}"
    )


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _free_name(folder: pathlib.Path, step: int) -> pathlib.Path:
  names = [folder / str(step)]
  while names[-1].exists():
    names.append(folder / f"{step}.{len(names)}")
  return names[-1]


def latest_step(workdir: str) -> int | None:
  """The newest checkpoint listed in a workdir, None if there is none."""
  steps = _listed(pathlib.Path(workdir))
  return steps[-1] if steps else None


def _listed(workdir: pathlib.Path) -> list[int]:
  """Steps of the checkpoints, oldest first."""
  folder = workdir / files.CHECKPOINTS
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in folder.iterdir()
    if _STEP.fullmatch(path.name) and path.is_dir()
  )


def read_config(workdir: str) -> dict[str, Any]:
  """The resolved config of the run in a workdir.

  Raises:
    ValueError: no run there.
  """
  path = pathlib.Path(workdir) / files.CONFIG
  if not path.is_file():
    raise ValueError(
      f"no run in {workdir}: {path.name} is missing; give the --workdir of a "
      "run of `python -m experiments.lm`"
    )
  return files.read_about(path.parent)["config"]


def read_newest(workdir: str, like: Any) -> Restored:
  """The newest checkpoint of another run that can be read.

  Nothing in the workdir is changed.

  Args:
    workdir: of the run.
    like: as in `Checkpoints.restore`.

  Raises:
    ValueError: no checkpoint there that can be read.
    LeavesMismatchError: it is of another model or optimizer.
  """
  if latest_step(workdir) is None:
    raise _no_checkpoint(workdir)
  with Checkpoints(pathlib.Path(workdir), read_only=True) as saver:
    restored = saver.restore(like)
  if restored is None:
    raise _no_checkpoint(workdir)
  return restored


def check_origin(workdir: str, like: Any, *, params_only: bool) -> None:
  """Finds early that another run's newest checkpoint cannot be started from.

  Args:
    workdir: of the other run.
    like: the abstract state.
    params_only: only the parameters will be taken.

  Raises:
    ValueError: no checkpoint there.
    LeavesMismatchError: it is of another model or optimizer.
  """
  step = latest_step(workdir)
  if step is None:
    raise _no_checkpoint(workdir)
  try:
    folder = pathlib.Path(workdir) / files.CHECKPOINTS
    saved = _meta(folder, step)["leaves"]
  except _OTHERS:
    raise
  except reading.DAMAGE:
    return  # An older one may be whole: reading finds it.
  expected = describe_leaves(like)
  if params_only:
    saved, expected = (
      {k: v for k, v in leaves.items() if k.startswith("params/")}
      for leaves in (saved, expected)
    )
  _check_leaves(step, saved, expected)


def _meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
  """The item `meta` of a checkpoint, whole and of a format that is read."""
  values = seal.open_(_json(folder, step, "meta"))
  files.check_format(folder / str(step), "a checkpoint", values)
  return values


def _json(folder: pathlib.Path, step: int, item: str) -> Any:
  """The JSON values of an item of a checkpoint, read without a manager."""
  path = folder / str(step) / item / "metadata"
  return json.loads(path.read_text(encoding="utf-8"))


def _no_checkpoint(workdir: str) -> ValueError:
  return ValueError(
    f"no checkpoint in {workdir}: train first, or give another workdir"
  )


def load_params(
  workdir: str,
  model: Any,
  *,
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[Any, int]:
  """Loads the parameters of a run, without its optimizer.

  Nothing in the workdir is changed: damaged checkpoints are passed over. Of
  several processes all call it.

  Args:
    workdir: of the run.
    model: its `init` gives the tree.
    step: which checkpoint; None: the newest that can be read.
    mesh: None: on the default device.

  Returns:
    The parameters and the step.

  Raises:
    ValueError: no checkpoint there that can be read, or of another model.
  """
  folder = pathlib.Path(workdir).resolve()
  steps = _listed(folder)
  if not steps:
    raise _no_checkpoint(workdir)
  if step is not None and step not in steps:
    raise ValueError(
      f"no checkpoint of step {step} in {workdir}; there are {steps}"
    )
  like = _abstract_params(model, mesh)
  _hush()
  candidates = [step] if step is not None else steps[::-1]
  error = None
  for candidate in candidates:
    try:
      return _read_params(folder, candidate, like), candidate
    except _OTHERS:
      raise
    except reading.DAMAGE as e:
      logging.warning(
        "checkpoint of step %d cannot be read (%s)", candidate, _first_line(e)
      )
      error = e
  raise ValueError(
    f"no checkpoint in {workdir} can be read (steps {sorted(candidates)})"
  ) from error


def _abstract_params(model: Any, mesh: jax.sharding.Mesh | None) -> Any:
  params = jax.eval_shape(model.init, jax.random.key(0))
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: here, params)
  else:
    shardings = sharding.param_shardings(params, mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    params,
    shardings,
  )


def _read_params(folder: pathlib.Path, step: int, like: Any) -> Any:
  """Only the branch "params" of the state is read."""
  folder = folder / files.CHECKPOINTS
  here = jax.tree.leaves(like)[0].sharding
  if isinstance(here, jax.sharding.NamedSharding):
    here = sharding.replicated(here.mesh)
  number = jax.ShapeDtypeStruct((), np.int32, sharding=here)
  item = {"params": like, "step": number}

  def read() -> tuple[dict[str, Any], Any]:
    meta = _meta(folder, step)
    saved = {k: v for k, v in meta["leaves"].items() if k.startswith("params/")}
    _check_leaves(step, saved, describe_leaves({"params": like}))
    return meta, reading.arrays(folder / str(step) / "state", item)

  meta, restored = reading.agreed(read)
  _check_step(step, restored)
  seal.check_sums(restored, meta)
  return restored["params"]
