"""Benchmark tasks scored while a model trains, without seqio.

The numbers are those of experiments.table1 on the same documents; TensorFlow
stays out of the training process.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from experiments.cli import distributed
from nl_jax.eval import encoding, evaluate, metrics, scoring, special

_MAX_LENGTH = 4096  # As experiments.table1 has it by default.


def make(
  tasks: Mapping[str, int],
  data_dir: str,
  net: Any,
  tokenizer: Any,
  mesh: jax.sharding.Mesh,
  batch_tokens: int,
) -> Callable[[Any], dict[str, float]]:
  """A function params -> {"eval/<task>/<metric>": value}.

  A task that fails, now or later, is logged and gives
  {"eval/<task>/failed": 1}; training continues.

  Args:
    tasks: documents of each task, 0 for all.
    data_dir: folder of the tasks' files.
    net: the model.
    tokenizer: that it is trained with.
    mesh: of its weights.
    batch_tokens: of a training step.

  Raises:
    ValueError: no such folder.
  """
  folder = pathlib.Path(data_dir or " ").expanduser()
  if not folder.is_dir():
    raise ValueError(
      f"eval.tasks need --data_dir, the folder of their files; got {data_dir!r}"
    )
  found = special.ids(tokenizer)
  protocol = encoding.Protocol(
    max_length=_MAX_LENGTH,
    window=net.sequence_length,
    prefix_id=found.prefix,
  )
  scorer = scoring.Scorer(
    net, tokenizer.vocab_size, mesh, batch_tokens=batch_tokens
  )
  prepared: dict[str, evaluate.Prepared | None] = {}
  for name, limit in tasks.items():
    prepared[name] = None
    try:
      prepared[name] = prepare(name, folder, tokenizer, protocol, limit)
    except evaluate.FAILURES as error:
      _tell(name, evaluate.sentence(error))

  def score(params: Any) -> dict[str, float]:
    values = {}
    for name, one in prepared.items():
      values |= _scored(
        name, one, distributed.together(lambda pairs: scorer(params, pairs))
      )
    return values

  return score


def prepare(
  name: str,
  folder: pathlib.Path,
  tokenizer: Any,
  protocol: encoding.Protocol,
  limit: int,
) -> evaluate.Prepared:
  """`evaluate.prepare`, alike on all processes: where one fails, all do."""
  return distributed.agreed(
    lambda: evaluate.prepare(name, folder, tokenizer, protocol, limit),
    lambda one: f"{one.loaded.sha256} {len(one.rows.rows)}",
  )


def _scored(
  name: str, one: evaluate.Prepared | None, score: evaluate.Score
) -> dict[str, float]:
  """The metrics of a task; without their standard errors."""
  if one is None:
    return {f"eval/{name}/failed": 1.0}
  try:
    values, _ = evaluate.direct(one, score)
  except evaluate.FAILURES as error:
    _tell(name, evaluate.sentence(error))
    return {f"eval/{name}/failed": 1.0}
  return {
    f"eval/{name}/{key}": value
    for key, value in values.items()
    if not key.endswith(metrics.SUFFIX)
  }


def _tell(name: str, said: str) -> None:
  logging.warning("task %s failed: %s; training continues", name, said)
