"""The training loop: one function, its order of operations, its result.

State i is the state after i updates. A line of `metrics.jsonl` with step i
holds the loss and norms of the update that led to state i (`train/`, `opt/`,
`memory/`), or what was measured on state i (`eval/`).
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from nl_jax import sharding
from nl_jax.train import (
  checkpoint,
  environment,
  faults,
  files,
  heap,
  profile,
  progress,
  reading,
)
from nl_jax.train import metrics as metrics_lib
from nl_jax.train import optimizer as optimizer_lib
from nl_jax.train import options as options_lib
from nl_jax.train import origin as origin_lib
from nl_jax.train import start as start_lib
from nl_jax.train import state as state_lib
from nl_jax.train import step as step_lib
from nl_jax.train import stop as stop_lib
from nl_jax.train import timer as timer_lib

Evaluate = Callable[[Any, int], Mapping[str, float]]
_DONE = "done"


class Result(NamedTuple):
  """How a run ended.

  Attributes:
    status: "done", "preempted" (SIGTERM, saved) or "interrupted" (Ctrl-C,
      saved): exit status 0, 0 and 130.
    step: number of updates made, over all starts of the run.
    state: {"params", "opt", "step", "skipped"} on the devices.
    metrics: the last value of each metric, by name.
  """

  status: str
  step: int
  state: Mapping[str, Any]
  metrics: Mapping[str, float]


class NonFiniteError(FloatingPointError):
  """A loss or gradient that is not finite; the message names the report."""


# What XLA says of too little memory: of accelerators, of a CPU.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


class OutOfMemoryError(MemoryError):
  """The devices have too little memory; the message says what to lower."""


class _Pending(NamedTuple):
  """A dispatched step whose metrics have not been read.

  Attributes:
    step: updates made when it is done.
    metrics: on the device.
    batch: on the device.
    rows: this process's part of the batch.
  """

  step: int
  metrics: step_lib.Metrics
  batch: step_lib.Batch
  rows: Mapping[str, np.ndarray]


def train(
  *,
  model: Any,
  optimizer: optimizer_lib.Optimizer,
  data: Iterator[Mapping[str, np.ndarray]],
  batch_size: int,
  sequence_length: int,
  workdir: str,
  config: Mapping[str, Any],
  options: options_lib.Options,
  fingerprint: str = "",
  mesh: jax.sharding.Mesh | None = None,
  evaluate: Evaluate | None = None,
  allow_config_change: bool = False,
  origin: origin_lib.Origin | None = None,
  flops_per_token: float = 0.0,
) -> Result:
  """Trains a model.

  It starts from the first of these that there is: the newest checkpoint of the
  workdir, that of `origin`, the seed.

  Args:
    model: `init(key) -> params` and `apply(params, tokens, segment_ids=) ->
      (logits, state, metrics)` (nl_jax.models.lm).
    optimizer: of `optimizer.make`.
    data: endless iterator of this process's rows, with `get_state()` and
      `set_state()`; its state is a JSON-able dict of integers.
    batch_size: rows of a step over all processes.
    sequence_length: tokens of a row.
    workdir: folder of the run, made if missing; `checkpoints/`,
      `metrics.jsonl`, `events/`, `config.json`, `results.json` live there.
    config: the resolved configuration, nested dicts of JSON values; a workdir
      with another one is refused.
    options: steps and what is due when.
    fingerprint: of the data; a workdir trained on other data is refused.
    mesh: of `sharding.mesh`; all devices on "fsdp" by default.
    evaluate: (params, step) -> {"eval/<set>/<metric>": value}; all processes
      call it.
    allow_config_change: continue with a config that differs from the workdir's.
    origin: a checkpoint of another run to start from, and what of it is kept;
      nothing there is changed.
    flops_per_token: of a training step, for MFU; 0: not shown.

  Returns:
    How the run ended. It is saved in every case.

  Raises:
    ValueError: options, batch or mesh do not fit, or the workdir is of another
      run.
    NonFiniteError: by the NaN policy; a report is in the workdir.
    StorageError: a file of the run cannot be written.
    OutOfMemoryError: of the devices.
  """
  mesh = sharding.mesh() if mesh is None else mesh
  if mesh.devices.flat[0].platform == "cpu":
    heap.keep_freed()
  sharding.check_batch(
    mesh,
    batch_size // options.carry_gradient,
    sequence_length,
    options.accumulate,
  )
  like = state_lib.abstract(model, optimizer.tx, mesh, options.streams)
  folder = pathlib.Path(workdir).resolve()
  if origin and checkpoint.latest_step(workdir) is None:
    origin_lib.check(origin, workdir, fingerprint, like)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    before = None
    if jax.process_index() == 0:
      stack.enter_context(files.lock(folder))
      before = files.check(
        folder, config, fingerprint, allow_config_change=allow_config_change
      )
    _barrier("workdir held")
    reading.check_shared(folder)
    saver = checkpoint.Checkpoints(
      folder, keep=options.keep, keep_period=options.keep_period
    )
    stack.enter_context(saver)
    about = {
      "config": config,
      "fingerprint": fingerprint,
      "processes": jax.process_count(),
      "batch_size": batch_size,
      "sequence_length": sequence_length,
      **environment.describe(),
    }
    finder = start_lib.Finder(
      folder, saver, model, like, mesh, about, optimizer.schedule,
      options.steps,
    )  # fmt: skip
    start = finder.find(before, origin)
    optimizer.clocks.clear()
    optimizer.clocks.update(start.clocks)
    run = _Run(
      model, optimizer, data, evaluate, options, folder, saver, mesh, about,
      start,
    )  # fmt: skip
    # Nothing of the run has changed up to here.
    run.claim(allow_config_change)
    saver.open()
    state = run.begin(like)
    stack.enter_context(run.open(flops_per_token))
    stack.enter_context(_memory_told())
    step = run.compile(like, batch_size, sequence_length)
    result = run.loop(step, state)
    saver.wait()
    run.finish(result)
  return result


class _Run:
  """The parts of one run, and what the loop does with them."""

  def __init__(
    self,
    model: Any,
    optimizer: optimizer_lib.Optimizer,
    data: Any,
    evaluate: Evaluate | None,
    options: options_lib.Options,
    folder: pathlib.Path,
    saver: checkpoint.Checkpoints,
    mesh: jax.sharding.Mesh,
    about: Mapping[str, Any],
    start: start_lib.Start,
  ):
    self.model, self.optimizer = model, optimizer
    self.data, self.evaluate = data, evaluate
    self.options, self.folder, self.saver = options, folder, saver
    self.mesh, self.about = mesh, about
    self.begun = start
    self.start = start.step  # Updates made before this start of the run.
    self.saved = start.saved  # The newest step that has a checkpoint.
    self.skipped = start.skipped
    self.timer = timer_lib.Timer(start.seconds)
    self.pending: _Pending | None = None

  def claim(self, allow_config_change: bool) -> None:
    """Makes the workdir this run's; what changes is said and written down."""
    chain = self.begun.chain
    if jax.process_index() == 0:
      changes = files.claim(
        self.folder,
        self.about["config"],
        self.about["fingerprint"],
        allow_config_change=allow_config_change,
        step=self.start,
        more={files.CHAIN: chain} if chain else None,
      )
      for change in changes:
        logging.info("changed at step %d: %s", self.start, change)
      if self.saved >= 0:
        files.mark_saved(self.folder)
    _barrier("workdir claimed")

  def begin(self, like: state_lib.State) -> state_lib.State:
    """The state to resume from, and the data at the same place."""
    if self.begun.place is not None:
      self.data.set_state(self.begun.place)
    if self.begun.state is not None:
      state, self.begun.state = self.begun.state, None  # It is given away.
      return state
    tx, seed = self.optimizer.tx, self.options.seed
    params = self.begun.params
    return state_lib.create(self.model, tx, like, seed=seed, params=params)

  @contextlib.contextmanager
  def open(self, flops: float) -> Iterator[None]:
    """Metrics, display and signal handlers, while the context lasts."""
    steps = self.options.steps
    tokens_per_step = self.about["batch_size"] * self.about["sequence_length"]
    self.rates = progress.Rates(steps, tokens_per_step, flops)
    traced = options_lib.parse_steps(self.options.profile_steps)
    with (
      metrics_lib.Writer(
        self.folder,
        step=self.start if self.saved >= 0 else None,
        since=(self.start, self.begun.tokens),
        tokens_per_step=tokens_per_step,
        enabled=jax.process_index() == 0,
      ) as self.writer,
      progress.Display(self.start, steps) as self.display,
      progress.Heartbeat(self.display.say) as self.heart,
      profile.Profile(traced, self.folder, self.start) as self.profile,
      stop_lib.listen(alone=jax.process_count() == 1) as self.stop,
    ):
      if flops and not self.rates.peak:
        kind = jax.devices()[0].device_kind
        self.display.say(f"no MFU: the peak rate of {kind!r} is not known")
      yield

  def compile(
    self,
    like: state_lib.State,
    batch_size: int,
    sequence_length: int,
  ) -> step_lib.Step:
    """The compiled step; of a run that is done, the step as it is."""
    options = self.options
    # What was skipped before a change of the policy is no reason to stop.
    limit = self.skipped
    self.max_skipped = (
      options.max_skipped if options.nan_policy == "skip" else limit
    )
    step = step_lib.make(
      self.model,
      self.optimizer.tx,
      self.optimizer.schedule,
      self.optimizer.labels,
      accumulate=options.accumulate,
      carry_gradient=options.carry_gradient,
      max_skipped=self.max_skipped,
    )
    if self.start == options.steps:
      return step
    begin = time.monotonic()
    self.heart.beat("compiling the training step")
    compiled = step_lib.compiled(
      step, like, self.mesh, batch_size, sequence_length
    )
    seconds = time.monotonic() - begin
    self.display.say(f"compiled the training step in {seconds:.1f} s")
    self.timer.read()
    return compiled

  def loop(self, step: step_lib.Step, state: state_lib.State) -> Result:
    """The loop. The order of what happens in a round must not change."""
    options = self.options
    # A step that is not compiled makes its constants as it goes.
    eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    guard = "allow" if eager else "disallow"
    with jax.transfer_guard(guard):
      for i in range(self.start, options.steps + 1):
        self.saver.check()
        if self.profile.ends(i):
          self._turn(state, self.profile.end)
        # 1. Evaluate state i. At the start of a resumed run that was done
        # before its checkpoint was taken.
        if i != self.start and options.due(i, options.eval_every):
          self._flush(state)
          self._evaluate(state, i)
        # 2. Save state i with the iterator as it is before the next batch.
        status = self._status(i)
        due = status or options.due(i, options.checkpoint_every)
        if due and i != self.saved:
          self._flush(state)
          self._save(state, i)
        if status:
          return Result(status, i, state, dict(self.writer.last))
        if self.profile.begins(i):
          self._turn(state, self.profile.begin)
        # 3. Draw a batch.
        self.heart.beat(f"waiting for the data of step {i + 1}")
        with self.timer.wait():
          rows = next(self.data)
        batch = self._to_devices(rows)
        # 4. Dispatch the step; nothing here waits for the device.
        self.heart.beat(f"computing step {i + 1}")
        with jax.profiler.StepTraceAnnotation("train", step_num=i + 1):
          state, metrics = step(state, batch)
        # 5. Handle the step before, while the device is busy with this one.
        self._flush(state)
        self.pending = _Pending(i + 1, metrics, batch, rows)
    raise AssertionError("the last round returns")

  def _turn(self, state: state_lib.State, turn: Callable[[], str]) -> None:
    """Begins or ends the trace, between two steps."""
    self._flush(state)
    jax.block_until_ready(state)
    self.heart.beat("writing the trace")
    with self.timer.pause(), jax.transfer_guard("allow"):
      self.display.say(turn())

  def _status(self, step: int) -> str:
    """Why to end here; "" to continue. The same answer on all processes."""
    if step == self.options.steps:
      return _DONE
    if jax.process_count() > 1:
      agreed = self.saver.preempted(step)
      return (self.stop.reason or stop_lib.PREEMPTED) if agreed else ""
    return self.stop.reason

  def _to_devices(self, rows: Mapping[str, np.ndarray]) -> step_lib.Batch:
    """The one transfer to the devices that a round is meant to have."""
    with jax.transfer_guard("allow"):
      return step_lib.on_mesh(rows, self.mesh, self.about["batch_size"])

  def _flush(self, state: state_lib.State) -> None:
    """Handles the metrics of the pending step, if there is one."""
    if self.pending is None:
      return
    pending, self.pending = self.pending, None
    values = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
    self.timer.step()
    failed = values["skipped"] > self.skipped
    if failed or self.options.logs(pending.step):
      rates = self.rates.read(pending.step, self.timer.read())
      self.writer.write(pending.step, values | rates)
      self.display.step(pending.step, values | rates)
    else:
      self.display.step(pending.step)
    if failed:
      self.skipped = int(values["skipped"])
      self._skip(pending, values, state)

  def _skip(
    self,
    pending: _Pending,
    values: Mapping[str, float],
    state: state_lib.State,
  ) -> None:
    """A step was not finite: a warning, or a report and the end."""
    what = (
      f"step {pending.step} is not finite: loss {values['train/loss']}, "
      f"gradient norm {values['opt/grad_norm']}"
    )
    if self.skipped <= self.max_skipped:
      logging.warning("%s; skipped (%d so far)", what, self.skipped)
      return
    # The step after it moved nothing: these are the parameters it saw.
    with jax.transfer_guard("allow"):
      path = faults.write(
        self.folder,
        pending.step,
        self.model,
        state["params"],
        pending.batch,
        pending.rows,
        values,
      )
    raise NonFiniteError(
      f"{what}; report in {path}. Lower optim.learning_rate, or continue with "
      "train.nan_policy=skip"
    )

  def _evaluate(self, state: state_lib.State, step: int) -> None:
    if self.evaluate is None:
      return
    self.heart.beat(f"evaluating step {step}")
    with self.timer.pause(), jax.transfer_guard("allow"):
      values = self.evaluate(state["params"], step)
    self.writer.write(step, values)
    shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
    self.display.say(f"step {step}/{self.options.steps} {shown}")

  def _save(self, state: state_lib.State, step: int) -> None:
    self.heart.beat(f"saving step {step}")
    with self.timer.pause(), jax.transfer_guard("allow"):
      begin = time.monotonic()
      # Lines up to this step must be there when the checkpoint is.
      self.writer.sync()
      rows = (step - self.start) * self.about["batch_size"]
      meta = {
        **self.about,
        "rows_consumed": self.begun.rows + rows,
        "tokens": self.begun.tokens + rows * self.about["sequence_length"],
        "train_seconds": self.timer.train_seconds,
        "clocks": dict(self.optimizer.clocks),
        "learning_rate": float(self.optimizer.schedule(step)),
      }
      self.saver.save(step, state, self.data.get_state(), meta)
      if self.saved < 0:
        # From the first one on the run is never begun again without.
        self.saver.wait()
        if jax.process_index() == 0:
          files.mark_saved(self.folder)
      seconds = time.monotonic() - begin
    self.saved = step
    logging.info("checkpoint of step %d begun in %.2f s", step, seconds)

  def finish(self, result: Result) -> None:
    """Leaves together, with the results of a run that is done."""
    if result.status == _DONE and jax.process_index() == 0:
      files.write_json(
        self.folder / files.RESULTS,
        {
          "step": result.step,
          "train_seconds": self.timer.train_seconds,
          "metrics": result.metrics,
        },
      )
    _barrier("end")


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
  """Turns XLA's report of too little memory into what to do about it."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not any(words in str(error) for words in _NO_MEMORY):
      raise
    first = str(error).strip().splitlines()[0][:160]
    raise OutOfMemoryError(
      f"the devices have too little memory ({first}); in this order: raise "
      "train.accumulate or lower data.batch_size, set train.remat=layer, "
      "raise mesh.fsdp, lower the chunk or raise remat_group of model.mixer"
    ) from error
