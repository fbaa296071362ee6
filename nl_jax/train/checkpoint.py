"""Checkpoints: state, place in the data, and what a run must know of itself.

Three items a step: `state` (arrays), `data` (the iterator's state, integers)
and `meta` (JSON). Writing continues in the background; a step that is not whole
is not listed. A listed step that cannot be read, or is not what was saved, is
moved aside, and the one before it taken.
"""

import contextlib
import logging as std_logging
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from nl_jax import files as whole
from nl_jax import sharding
from nl_jax.train import files, kept, reading, seal, stored
from nl_jax.train.stored import LeavesMismatchError as LeavesMismatchError
from nl_jax.train.stored import Restored as Restored
from nl_jax.train.stored import StepMismatchError as StepMismatchError

_ITEMS = ("state", "data", "meta")
_DAMAGED = "damaged"
# What they raise where the disk is full or gone.
_REFUSED = (ValueError, OSError, jax.errors.JaxRuntimeError)


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

  vars(hook)["hushes_late_writes"] = True
  sys.unraisablehook = hook


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for writes.

  Reading changes nothing. `open`, which the first `save` calls too, makes the
  folder and moves aside what could not be read.
  """

  def __init__(
    self, workdir: pathlib.Path, *, keep: int = 3, keep_period: int = 0
  ):
    """Of the folder `checkpoints` of a workdir.

    Args:
      workdir: of the run.
      keep: number of newest checkpoints to keep.
      keep_period: keep all multiples of this step; 0 disables it.
    """
    _hush()
    self._workdir = workdir.resolve()
    self._folder = self._workdir / files.CHECKPOINTS
    self._keep, self._keep_period = keep, keep_period
    self._damaged: list[int] = []
    self._begun = 0
    self._manager: Any = None  # A CheckpointManager, from `open` on.

  def open(self) -> None:
    """Makes the folder, ready to be saved to; all processes call it."""
    if self._manager is not None:
      return
    self._set_aside()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep,
      keep_period=self._keep_period or None,
      create=True,
      enable_async_checkpointing=True,
      # Left by a run killed while it saved.
      cleanup_tmp_directories=True,
    )
    with files.writing(self._folder):
      self._manager = ocp.CheckpointManager(
        self._folder, options=options, item_names=_ITEMS
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    if self._manager is None or kind and reading.is_of_others(error[0]):
      return  # A write in flight waits for a process that is gone.
    try:
      # Leaving with a write in flight would lose it.
      with self._writing():
        self._manager.close()
    except files.StorageError:
      # What ended the run has been reported.
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
      reason = full if full in str(error) else stored.first_line(error)
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
      "leaves": stored.describe_leaves(state),
      seal.SUMS: seal.sums(state),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(whole.sealed({**meta, **about, "data": data})),
    )
    self.open()
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

  def restore(self, like: Any, without: str = "") -> Restored | None:
    """The newest checkpoint that can be read; None where there is none.

    Nothing is changed: `open` moves steps that cannot be read to the folder
    `damaged` of the workdir.

    Args:
      like: the abstract state; its shardings are those of the result.
      without: a branch of the state that is not read.

    Raises:
      LeavesMismatchError: the checkpoint is of another model or optimizer.
      FormatError: it is of a format that this version does not read.
      ValueError: there are checkpoints and none can be read.
    """
    read = lambda step: stored.read(self._folder, step, like, without)
    restored, damaged = stored.newest(self._workdir, read)
    if damaged and restored is None:
      raise stored.unreadable(self._folder, damaged)
    self._damaged = sorted(damaged)
    if restored is not None:
      for step, error in damaged.items():
        logging.warning(
          "checkpoint of step %d cannot be read (%s); resuming from step %d",
          step,
          stored.first_line(error),
          restored.step,
        )
    return restored

  def _set_aside(self) -> None:
    """Moves unreadable steps away: orbax takes no step before its latest."""
    if not self._damaged:
      return
    aside = self._workdir / _DAMAGED
    if jax.process_index() == 0:
      aside.mkdir(exist_ok=True)
      for step in self._damaged:
        (self._folder / str(step)).rename(_free_name(aside, step))
    logging.warning("moved to %s: steps %s", aside, self._damaged)
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices("damaged checkpoints")


def _free_name(folder: pathlib.Path, step: int) -> pathlib.Path:
  names = [folder / str(step)]
  while names[-1].exists():
    names.append(folder / f"{step}.{len(names)}")
  return names[-1]


def latest_step(workdir: str) -> int | None:
  """The newest checkpoint listed in a workdir, None if there is none."""
  steps = stored.listed(pathlib.Path(workdir))
  return steps[-1] if steps else None


def read_config(workdir: str) -> dict[str, Any]:
  """The resolved config of the run in a workdir, its tokenizer the one there.

  Raises:
    ValueError: no run there, or its tokenizer is not what it was.
  """
  path = pathlib.Path(workdir) / files.CONFIG
  if not path.is_file():
    raise ValueError(
      f"no run in {workdir}: {path.name} is missing; give the --workdir of a "
      "run of `python -m experiments.lm`"
    )
  about = files.read_about(path.parent)
  config = about["config"]
  if own := kept.path_of(path.parent, about):
    config["data"]["tokenizer"] = own
  return config


def read_other(
  workdir: str, like: Any, step: int | None = None, without: str = ""
) -> Restored:
  """A checkpoint of another run.

  Nothing in the workdir is changed.

  Args:
    workdir: of the run.
    like: as in `Checkpoints.restore`.
    step: which; None: the newest that can be read.
    without: a branch of the state that is not read.

  Raises:
    ValueError: no checkpoint there that can be read.
    LeavesMismatchError: it is of another model or optimizer.
  """
  if step is not None:
    folder = stored.folder_of(workdir)
    read = lambda s: stored.read(folder, s, like, without)
    return stored.one(workdir, step, read)
  restored = Checkpoints(pathlib.Path(workdir)).restore(like, without)
  if restored is None:
    raise stored.no_checkpoint(workdir)
  return restored


def check_origin(
  workdir: str,
  like: Any,
  *,
  params_only: bool,
  step: int | None = None,
  without: str = "",
) -> None:
  """Finds early that another run's checkpoint cannot be started from.

  Args:
    workdir: of the other run.
    like: the abstract state.
    params_only: only the parameters will be taken.
    step: which; None: the newest.
    without: a branch of the state that will not be taken.

  Raises:
    ValueError: no checkpoint there.
    LeavesMismatchError: it is of another model or optimizer.
  """
  stored.check_there(workdir, step)
  step = latest_step(workdir) if step is None else step
  assert step is not None  # `check_there` found one.
  try:
    saved = stored.read_meta(stored.folder_of(workdir), step)["leaves"]
  except stored.OTHERS:
    raise
  except reading.DAMAGE:
    return  # An older one may be whole: reading finds it.
  expected = stored.left(stored.describe_leaves(like), without)
  saved = stored.left(saved, without)
  if params_only:
    saved, expected = (
      {k: v for k, v in leaves.items() if k.startswith("params/")}
      for leaves in (saved, expected)
    )
  stored.check_leaves(step, saved, expected)


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
  stored.check_there(workdir, step)
  like = _abstract_params(model, mesh)
  _hush()
  read = lambda s: (_read_params(folder, s, like), s)
  if step is not None:
    return stored.one(workdir, step, read)
  found, damaged = stored.newest(folder, read)
  if found is None:
    if damaged:
      raise stored.unreadable(folder, damaged)
    raise stored.no_checkpoint(workdir)
  for number, error in damaged.items():
    logging.warning(
      "checkpoint of step %d cannot be read (%s)",
      number,
      stored.first_line(error),
    )
  return found


def _abstract_params(model: Any, mesh: jax.sharding.Mesh | None) -> Any:
  params = jax.eval_shape(model.init, jax.random.key(0))
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: here, params)
  else:
    shardings = sharding.param_shardings(params, model.axes(), mesh)
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
    here = jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec())
  number = jax.ShapeDtypeStruct((), np.int32, sharding=here)
  item = {"params": like, "step": number}

  def read() -> tuple[dict[str, Any], Any]:
    meta = stored.read_meta(folder, step)
    saved = {k: v for k, v in meta["leaves"].items() if k.startswith("params/")}
    expected = stored.describe_leaves({"params": like})
    stored.check_leaves(step, saved, expected)
    return meta, reading.arrays(folder / str(step) / "state", item)

  meta, restored = reading.agreed(read)
  stored.check_step(step, restored)
  seal.check_sums(restored, meta)
  return restored["params"]
