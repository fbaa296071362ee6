"""What a run of the loop does, and when."""

import dataclasses
import re
from typing import Annotated, NamedTuple

from nl_jax import fields
from nl_jax.fields import OneOf, Whole

# Where a config has the fields of `Settings` that are not in its group train.
CHECKPOINT = {
  "every": "checkpoint_every",
  "keep": "keep",
  "keep_period": "keep_period",
}


class Steps(NamedTuple):
  """The first and the last step of a trace."""

  first: int
  last: int


def parse_steps(text: str) -> Steps | None:
  """Steps written as "10:13", both included; None of "".

  Raises:
    ValueError: it is written in another way, or ends before it begins.
  """
  if text == "":
    return None
  found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", str(text))
  steps = Steps(int(found[1]), int(found[2])) if found else None
  if steps is None or steps.last < steps.first:
    raise ValueError(
      "train.profile_steps must be the first and the last step to trace, as "
      f"10:13, the first at least 1, or empty; got {text!r}"
    )
  return steps


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the loop does, and when; counts are outer steps.

  Attributes:
    steps: optimizer steps of the whole run.
    log_every: steps between two lines of metrics (also at the first and last).
    eval_every: steps between two evaluations (also at the end); 0: only at the
      end.
    accumulate: micro-batches of one step; must divide the batch.
    streams: rows that carry their memories from step to step; 0: every row is
      read from an empty memory.
    carry_gradient: with data.rows=stream, rows of each stream in a step,
      through which gradients pass.
    nan_policy: what to do with a step whose loss or gradient is not finite:
      "raise" an error, or "skip" its update.
    max_skipped: with "skip", the number of skipped steps beyond which an error
      is raised.
    checkpoint_every: steps between two checkpoints (also at the end); 0: only
      at the end.
    keep: number of newest checkpoints to keep.
    keep_period: keep every checkpoint whose step is a multiple of this; 0
      disables it.
    seed: seed of the initial weights.
    profile_steps: first and last step to trace, as "10:13"; "" for none.
  """

  steps: Annotated[int, Whole(1)]
  log_every: Annotated[int, Whole(1)] = 10
  eval_every: Annotated[int, Whole(0)] = 0
  accumulate: Annotated[int, Whole(1)] = 1
  streams: Annotated[int, Whole(0)] = 0
  carry_gradient: Annotated[int, Whole(1)] = 1
  nan_policy: Annotated[str, OneOf("raise", "skip")] = "raise"
  max_skipped: Annotated[int, Whole(0)] = 100
  checkpoint_every: Annotated[int, Whole(0)] = 0
  keep: Annotated[int, Whole(1)] = 3
  keep_period: Annotated[int, Whole(0)] = 0
  seed: Annotated[int, fields.SEED] = 0
  profile_steps: str = ""

  def __post_init__(self):
    for name, value in vars(self).items():
      place = {x: f"checkpoint.{k}" for k, x in CHECKPOINT.items()}
      path = place.get(name, f"train.{name}")
      fields.check_value(path, fields.of(Settings)[name], value)
    traced = parse_steps(self.profile_steps)
    if traced and traced.first > self.steps:
      raise ValueError(
        f"train.profile_steps={self.profile_steps} begins after train.steps="
        f"{self.steps}; give earlier steps"
      )

  def due(self, step: int, every: int) -> bool:
    """Whether what happens every so many steps, and at the end, is due."""
    return step == self.steps or every > 0 and step > 0 and step % every == 0

  def logs(self, step: int) -> bool:
    """Whether a step has a line of metrics."""
    return step == 1 or self.due(step, self.log_every)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is measured while training; the group `eval`.

  Attributes:
    batches: batches of validation data; 0 for all of them.
    tasks: names of benchmark tasks scored while training.
  """

  batches: Annotated[int, Whole(0)] = 0
  tasks: tuple[str, ...] = ()

  def __post_init__(self):
    fields.check("eval", Evaluation, vars(self))
