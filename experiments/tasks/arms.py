"""The models that are compared where no --config is given, and how any is made.

A config gives the shape and the switches; vocabulary, length and batch are the
task's. Slow levels keep the number of steps between two updates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import config_dict

from experiments.cli import named
from experiments.tasks import lstm, problems
from nl_jax import build

_TASK_SETS = ("vocab_size",)  # Fields of `model` that the task decides.
_LSTM = "LSTM"


class Arm(NamedTuple):
  """One model.

  Attributes:
    title: in the table.
    config: name of its config; "" for the LSTM.
    changes: of it, by path.
  """

  title: str
  config: str
  changes: Mapping[str, Any] = {}


# What makes parity learnable at all (docs/mathematics.md 2.8): writes that turn
# a sign, and memories that keep.
_SIGNS = {"model.mixer.eta_max": 2.0, "model.mixer.alpha_bias": 6.0}
_NEGATIVE = {"model.mixer.allow_neg_eigval": True}
_COMPARED = (
  Arm("Transformer++", "transformer_tiny"),
  Arm("Gated DeltaNet", "gated_deltanet_tiny"),
  Arm("Gated DeltaNet, eigenvalues to -1", "gated_deltanet_tiny", _NEGATIVE),
  Arm("HOPE, matrices, eta to 2", "hope_linear_tiny", _SIGNS),
  Arm("HOPE, MLPs", "hope_tiny"),
)
_SMOKE = (
  Arm("Transformer++", "transformer_tiny"),
  Arm("DeltaNet", "deltanet_tiny"),
)


def compared(task: str, preset: str) -> tuple[Arm, ...]:
  """The arms of a task; the LSTM shows that the languages' harness is right."""
  arms = _SMOKE if preset == problems.SMOKE else _COMPARED
  if preset != problems.PAPER:
    # Width 64: what a CPU trains in minutes. Of the paper's size: 128.
    arms = tuple(arm._replace(config=f"{arm.config}:smoke") for arm in arms)
  if task == problems.MQAR or preset == problems.SMOKE:
    return arms
  return (*arms, Arm(_LSTM, ""))


def chosen(name: str, config: config_dict.ConfigDict) -> Arm:
  """The arm of --config and its --config.model.… changes.

  Raises:
    ValueError: a change of what the task decides.
  """
  before = dict(_leaves(named.load_config(name)))
  changes = {k: v for k, v in _leaves(config) if before.get(k) != v}
  for path in changes:
    group, _, field = path.partition(".")
    if group != "model" or field in _TASK_SETS:
      raise ValueError(
        f"--config.{path} is decided by the task: change switches of the model "
        "there, and sizes by --steps, --batch_size, --learning_rates, --seeds"
      )
  title = " ".join([name, *(f"{_short(k)}={v}" for k, v in changes.items())])
  return Arm(title, name, changes)


def model(arm: Arm, vocab_size: int, length: int, tokens_per_step: int) -> Any:
  """The model of an arm, for a task.

  Args:
    arm: which.
    vocab_size: ids of the task.
    length: of its longest row.
    tokens_per_step: of a batch.
  """
  if not arm.config:
    return lstm.LSTM(vocab_size)
  config = config_dict.ConfigDict(named.load_config(arm.config).to_dict())
  for path, value in arm.changes.items():
    named.check_key(config, path)
    group, _, field = path.rpartition(".")
    _group(config, group)[field] = value
  before = build.tokens_per_step(config)
  if "periods" in config.model.cms:
    periods = config.model.cms.periods
    config.model.cms.periods = tuple(
      period // before * tokens_per_step for period in periods
    )
  config.model.vocab_size = vocab_size
  config.data.sequence_length = length
  config.train.remat = "none"
  return build.model(build.resolve(config))


def described(net: Any) -> dict[str, Any]:
  """All that makes a model, as JSON values."""
  return {"class": type(net).__name__, **_json(dataclasses.asdict(net))}


def _json(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _json(x) for key, x in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _group(config: config_dict.ConfigDict, path: str) -> Any:
  for key in path.split("."):
    config = config[key]
  return config


def _leaves(config: Any, path: str = "") -> Any:
  """(path, value) of every field."""
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      yield from _leaves(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", value


def _short(path: str) -> str:
  return path.removeprefix("model.")
