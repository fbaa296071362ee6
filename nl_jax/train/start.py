"""Where a run stands when it starts; nothing is changed in finding that out."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import optax
from absl import logging

from nl_jax.train import checkpoint, files, optimizer
from nl_jax.train import origin as origin_lib
from nl_jax.train import state as state_lib


@dataclasses.dataclass
class Start:
  """What was made before this start of a run.

  Attributes:
    step: updates.
    rows: drawn of these data.
    tokens: seen, padding included.
    skipped: updates that were not finite.
    seconds: of training.
    state: the training state; None of a run of step 0.
    params: to begin with, where there is no state; None: they are drawn.
    place: in the data, of their iterator; None: at their first row.
    saved: the step of the workdir's own checkpoint; -1: it has none.
    chain: what the run comes from (`origin.chain`).
    clocks: of the levels' rates (`optimizer.Optimizer`).
  """

  step: int = 0
  rows: int = 0
  tokens: int = 0
  skipped: int = 0
  seconds: float = 0.0
  state: Any = None
  params: Any = None
  place: Any = None
  saved: int = -1
  chain: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  clocks: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finder:
  """What a start must fit.

  Attributes:
    folder: of the run.
    saver: of its checkpoints.
    model: `init(key) -> params`.
    like: the abstract state.
    mesh: where the state lives.
    about: of the run: its fingerprint, rows of a batch, length of a row.
    schedule: step -> learning rate.
    steps: of the whole run.
  """

  folder: pathlib.Path
  saver: checkpoint.Checkpoints
  model: Any
  like: Any
  mesh: jax.sharding.Mesh
  about: Mapping[str, Any]
  schedule: optax.Schedule
  steps: int

  def find(
    self,
    before: Mapping[str, Any] | None,
    origin: origin_lib.Origin | None,
  ) -> Start:
    """The newest checkpoint of the workdir, else the origin, else step 0.

    Args:
      before: what the run's config.json said; None: there was none.
      origin: of another run.

    Raises:
      ValueError: a checkpoint does not fit, or the run has lost its own.
    """
    restored = self.saver.restore(self.like)
    if restored is not None:
      start = self._at(restored, str(self.folder))
      return dataclasses.replace(start, saved=restored.step)
    files.check_lost(self.folder, before)
    if origin is None:
      logging.info("starting from scratch in %s", self.folder)
      return Start()
    if origin.keep == origin_lib.WEIGHTS:
      params, step = checkpoint.load_params(
        origin.workdir, self.model, step=origin.step, mesh=self.mesh
      )
      return Start(params=params, chain=self._chain(origin, step))
    return self._from(origin)

  def _from(self, origin: origin_lib.Origin) -> Start:
    """Where another run stands, with all but the place in other data."""
    without = origin_lib.without(origin)
    like = {k: x for k, x in self.like.items() if k != without}
    restored = checkpoint.read_other(origin.workdir, like, origin.step, without)
    start = self._at(restored, origin.workdir)
    start.chain = self._chain(origin, restored.step)
    if origin.keep == origin_lib.ALL:
      before, now = restored.meta["fingerprint"], self.about["fingerprint"]
      origin_lib.check_data(origin, before, now)
    else:
      start.place, start.rows = None, 0
      start.state = state_lib.with_carried(self.model, start.state, self.like)
    if start.step == self.steps:
      raise ValueError(
        f"{origin.workdir} is at step {start.step}, and train.steps="
        f"{self.steps} asks for no more; raise train.steps"
      )
    return start

  def _at(self, restored: checkpoint.Restored, workdir: str) -> Start:
    """Where a checkpoint stands."""
    logging.info("resuming from step %d in %s", restored.step, workdir)
    if restored.step > self.steps:
      raise ValueError(
        f"{workdir} is at step {restored.step}, beyond train.steps="
        f"{self.steps}; raise train.steps or give another --workdir"
      )
    meta = restored.meta
    self._tell_rate(restored.step, meta.get("learning_rate"))
    rows = meta["rows_consumed"]
    tokens = rows * self.about["sequence_length"]
    return Start(
      step=restored.step,
      rows=rows,
      tokens=meta.get("tokens", tokens),
      skipped=int(restored.state["skipped"]),
      seconds=meta["train_seconds"],
      state=restored.state,
      place=restored.data,
      clocks=self._clocks(restored),
    )

  def _clocks(
    self, restored: checkpoint.Restored
  ) -> dict[str, tuple[int, int]]:
    """Those of the checkpoint, or from it on where the batch has changed."""
    sizes = ("batch_size", "sequence_length")
    meta = {"sequence_length": self.about["sequence_length"], **restored.meta}
    if math.prod(meta[x] for x in sizes) != math.prod(
      self.about[x] for x in sizes
    ):
      return optimizer.clocks_of(restored.state["opt"], restored.step)
    return {k: (a, b) for k, (a, b) in meta.get("clocks", {}).items()}

  def _tell_rate(self, step: int, before: float | None) -> None:
    """Says what another schedule does to the learning rate."""
    now, end = float(self.schedule(step)), float(self.schedule(self.steps - 1))
    if before is None or math.isclose(before, now, rel_tol=1e-5):
      return
    logging.info(
      "the learning rate of step %d was %.3g; it is %.3g now, and %.3g at the "
      "end",
      step + 1,
      before,
      now,
      end,
    )

  def _chain(
    self, origin: origin_lib.Origin, step: int
  ) -> list[dict[str, Any]]:
    """What the run comes from, once it has been said."""
    found = origin_lib.chain(origin, step)
    told = origin_lib.describe(found[-1])
    logging.info("starting %s, in %s", told, self.folder)
    return found
