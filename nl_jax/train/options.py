"""What a run of the loop does, and when."""

import dataclasses
import re
from typing import Annotated, NamedTuple

from nl_jax import fields
from nl_jax.fields import OneOf, Whole

# Where a config has the fields of `Options` that are not in its group train.
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
class Options:
  """What the loop does, and when; counts are outer steps.

  Attributes:
    steps: updates of the whole run.
    log_every: a line of metrics every so many steps (and at 1 and the last).
    eval_every: an evaluation every so many steps and at the end; 0: at the end.
    accumulate: micro-batches of one step; divides the batch.
    streams: rows that carry their memories from step to step; 0: every row is
      read from an empty memory.
    carry_gradient: rows of each stream in a step, which gradients reach
      through, with data.rows=stream.
    nan_policy: of a step that is not finite: "raise", or "skip" its update.
    max_skipped: with "skip", more skipped steps than these raise.
    checkpoint_every: a checkpoint every so many steps and at the end; 0: at
      the end.
    keep: newest checkpoints that stay.
    keep_period: checkpoints at multiples of it stay too; 0: none does.
    seed: of the initial weights.
    profile_steps: first and last step of a trace, as "10:13"; "": none.
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
      fields.check_value(path, fields.of(Options)[name], value)
    traced = parse_steps(self.profile_steps)
    if traced and traced.first > self.steps:
      raise ValueError(
        f"train.profile_steps={self.profile_steps} begins behind train.steps="
        f"{self.steps}; give earlier steps"
      )

  def due(self, step: int, every: int) -> bool:
    """Whether what happens every so many steps, and at the end, is due."""
    return step == self.steps or every > 0 and step > 0 and step % every == 0

  def logs(self, step: int) -> bool:
    """Whether a step has a line of metrics."""
    return step == 1 or self.due(step, self.log_every)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
  """What is measured while training; the group `eval`.

  Attributes:
    batches: of validation; 0: all of it.
    tasks: names of benchmark tasks scored while training.
  """

  batches: Annotated[int, Whole(0)] = 0
  tasks: tuple[str, ...] = ()

  def __post_init__(self):
    fields.check("eval", EvalOptions, vars(self))
