"""What a run of the loop does, and when."""

import dataclasses

from nl_jax.train import profile

_POLICIES = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the loop does, and when; counts are outer steps.

  Attributes:
    steps: updates of the whole run.
    log_every: a line of metrics every so many steps (and at 1 and the last).
    eval_every: `evaluate` every so many steps and at the end; 0: at the end.
    accumulate: micro-batches of one step; divides the batch.
    streams: rows that carry their memories from step to step; 0: every row is
      read from an empty memory.
    carry_gradient: rows of each stream in a step, which gradients reach
      through.
    nan_policy: "raise", or "skip" the update of a non-finite step.
    max_skipped: with "skip", more skipped steps than these raise.
    checkpoint_every: a checkpoint every so many steps and at the end; 0: at
      the end.
    keep: newest checkpoints that stay.
    keep_period: checkpoints at multiples of it stay too; 0: none does.
    seed: of the initial parameters.
    profile_steps: first and last step of a trace, as "10:13"; "": none.
  """

  steps: int
  log_every: int = 10
  eval_every: int = 0
  accumulate: int = 1
  streams: int = 0
  carry_gradient: int = 1
  nan_policy: str = "raise"
  max_skipped: int = 100
  checkpoint_every: int = 0
  keep: int = 3
  keep_period: int = 0
  seed: int = 0
  profile_steps: str = ""

  def __post_init__(self):
    traced = profile.parse(self.profile_steps)
    least = {
      "train.steps": (self.steps, 1),
      "train.log_every": (self.log_every, 1),
      "train.eval_every": (self.eval_every, 0),
      "train.accumulate": (self.accumulate, 1),
      "train.carry_gradient": (self.carry_gradient, 1),
      "train.max_skipped": (self.max_skipped, 0),
      "checkpoint.every": (self.checkpoint_every, 0),
      "checkpoint.keep": (self.keep, 1),
      "checkpoint.keep_period": (self.keep_period, 0),
      "train.seed": (self.seed, 0),
    }
    for key, (value, bound) in least.items():
      if not isinstance(value, int) or value < bound:
        raise ValueError(
          f"{key} must be a whole number of at least {bound}, got {value!r}"
        )
    if traced and traced.first > self.steps:
      raise ValueError(
        f"train.profile_steps={self.profile_steps} begins behind train.steps="
        f"{self.steps}; give earlier steps"
      )
    if self.nan_policy not in _POLICIES:
      raise ValueError(
        f"train.nan_policy must be one of {', '.join(_POLICIES)}; got "
        f"{self.nan_policy!r}"
      )

  def due(self, step: int, every: int) -> bool:
    """Whether what happens every so many steps, and at the end, is due."""
    return step == self.steps or every > 0 and step > 0 and step % every == 0

  def logs(self, step: int) -> bool:
    """Whether a step has a line of metrics."""
    return step == 1 or self.due(step, self.log_every)
