"""The training loop: one function, its order of operations, its result.

State i is the state after i updates. A line of `metrics.jsonl` with step i
holds the loss and norms of the update that led to state i (`train/`, `opt/`,
`memory/`), or what was measured on state i (`eval/`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from nl_jax.train import optimizer as optimizer_lib

Evaluate = Callable[[Any, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the loop does, and when; counts are outer steps.

  Attributes:
    steps: updates of the whole run.
    log_every: a line of metrics every so many steps (and at 1 and the last).
    eval_every: `evaluate` every so many steps and at the end; 0: at the end.
    accumulate: micro-batches of one step; divides the batch.
    nan_policy: "raise", or "skip" the update of a non-finite step.
    max_skipped: with "skip", more skipped steps than these raise.
    checkpoint_every: a checkpoint every so many steps and at the end; 0: at
      the end.
    keep: newest checkpoints that stay.
    seed: of the initial parameters.
  """

  steps: int
  log_every: int = 10
  eval_every: int = 0
  accumulate: int = 1
  nan_policy: str = "raise"
  max_skipped: int = 100
  checkpoint_every: int = 0
  keep: int = 3
  seed: int = 0


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


class NonFiniteError(ArithmeticError):
  """A loss or gradient that is not finite; the message names the report."""


def train(
  *,
  model: Any,
  optimizer: optimizer_lib.Optimizer,
  data: Iterator[Mapping[str, np.ndarray]],
  batch_size: int,
  sequence_length: int,
  workdir: str,
  config: Mapping[str, Any],
  settings: Settings,
  fingerprint: str = "",
  mesh: jax.sharding.Mesh | None = None,
  evaluate: Evaluate | None = None,
  allow_config_change: bool = False,
  flops_per_token: float = 0.0,
) -> Result:
  """Trains a model, from the newest checkpoint of the workdir if there is one.

  Args:
    model: `init(key) -> params`, `apply(params, tokens, segment_ids=) ->
      (logits, state, metrics)` and `levels()` (nl_jax.models.lm).
    optimizer: of `optimizer.make`.
    data: endless iterator of this process's rows, with `get_state()` and
      `set_state()`; its state is a JSON-able dict of integers.
    batch_size: rows of a step over all processes.
    sequence_length: tokens of a row.
    workdir: folder of the run, made if missing; `checkpoints/`,
      `metrics.jsonl`, `events/`, `config.json`, `results.json` live there.
    config: the resolved configuration, nested dicts of JSON values; a workdir
      with another one is refused.
    settings: steps and what is due when.
    fingerprint: of the data; a workdir trained on other data is refused.
    mesh: of `sharding.mesh`; all devices on "fsdp" by default.
    evaluate: (params, step) -> {"eval/<set>/<metric>": value}; all processes
      call it.
    allow_config_change: go on with a config that differs from the workdir's.
    flops_per_token: of a training step, for MFU; 0: not shown.

  Returns:
    How the run ended. It is saved in every case.

  Raises:
    ValueError: settings, batch or mesh do not fit, or the workdir is of another
      run.
    NonFiniteError: by the NaN policy; a report is in the workdir.
  """
  raise NotImplementedError
