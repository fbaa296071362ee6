"""The outer optimizer: the recipe of model.md 7.1 around the levels' periods."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax


class Optimizer(NamedTuple):
  """An optimizer and what is told of it.

  Attributes:
    tx: the whole chain: clip, levels, rule, decay, learning rate.
    schedule: step (from 0) -> learning rate of the slow weights.
    rows: its rows of the level card.
  """

  tx: optax.GradientTransformation
  schedule: optax.Schedule
  rows: tuple[Any, ...]


def make(
  model: Any,
  *,
  steps: int,
  tokens_per_step: int,
  learning_rate: float,
  name: str = "adamw",
  warmup_steps: int = 0,
  weight_decay: float = 0.1,
  clip_norm: float = 1.0,
  min_ratio: float = 0.1,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  options: Mapping[str, Any] | None = None,
) -> Optimizer:
  """Builds the optimizer of a model; the config group `optim`.

  Args:
    model: its `levels()` labels the parameters; `model.cms` has the levels'
      periods in tokens and the variant.
    steps: of the whole run: the end of the cosine.
    tokens_per_step: tokens of a batch, batch_size * sequence_length; every
      CMS period is a multiple.
    learning_rate: peak.
    name: a key of `RULES`.
    warmup_steps: steps of linear warm-up.
    weight_decay: decoupled, multiplied by the learning rate; matrices only.
    clip_norm: global norm of the gradient; 0: no clip.
    min_ratio: the last learning rate over the peak.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    options: further keyword arguments of the rule.

  Raises:
    ValueError: an unknown name or option, a value out of range, a period that
      is no multiple of the batch's tokens.
  """
  raise NotImplementedError
