"""The run that `experiments.stack` leaves: a config, and a checkpoint 0."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from experiments.configs import _common
from nl_jax import build
from nl_jax.models.incontext import model as incontext
from nl_jax.pretrained import hf_config
from nl_jax.train import checkpoint, environment, files

_NO_DATA = "no data yet"  # In the place of the data's fingerprint.
_LONGEST = 4096  # Tokens of a row, unless the model was made for fewer.
_ROWS = 8  # Of a step.
_SLOWER = 4  # Times, from level to level (Table 1's configs).


def learn_in_context(
  group: dict[str, Any],
  params: dict[str, Any],
  chunks: tuple[int, ...],
  rates: tuple[float, ...],
) -> None:
  """Lets the fastest levels of a converted model learn while it reads.

  With rates of 0 the logits stay what they were (docs/mathematics.md 4.4).

  Args:
    group: the group `model`, changed in place.
    params: likewise.
    chunks: tokens between two updates of each, fastest first.
    rates: their learning rates at the start.

  Raises:
    ValueError: chunks that do not fit each other or the levels.
  """
  names = group["cms"]["levels"]
  if len(chunks) > len(names):
    raise ValueError(
      f"--chunks has {len(chunks)} entries for the levels {', '.join(names)}: "
      "at most one each"
    )
  options = incontext.Options(
    chunks=chunks, fast_levels=names[: len(chunks)], rates=rates
  )
  group["cms"] |= dataclasses.asdict(options)
  log_rate = jnp.log(jnp.asarray(rates, jnp.float32))
  params["in_context"] = {"log_rate": np.asarray(log_rate)}


def config(
  group: Mapping[str, Any], said: Mapping[str, Any], tokenizer: str
) -> config_dict.ConfigDict:
  """A whole config; how it trains is a start, not a finding.

  Args:
    group: the group `model`.
    said: the object of the pretrained model's config.json.
    tokenizer: as `data.tokenizer`.
  """
  made = _common.language_model("340m", group)
  longest = hf_config.size(said, "max_position_embeddings", _LONGEST)
  made.data.update(
    tokenizer=tokenizer,
    sequence_length=min(_LONGEST, longest),
    batch_size=_ROWS,
  )
  made.optim.update(learning_rate=1e-5, warmup_steps=100)
  made.train.steps = 1000
  cms = made.model.cms
  levels = len(cms.levels)
  if levels > 1 and "chunks" not in cms:
    step = build.tokens_per_step(made)
    cms.periods = tuple(step * _SLOWER**i for i in range(levels))
  return made


def save(
  workdir: pathlib.Path,
  made: config_dict.ConfigDict,
  params: Any,
) -> None:
  """Writes the workdir of a run that has made no step, without an optimizer.

  It has no place in any data, so `lm` starts from it in a workdir of its own
  (--from, --keep=weights).

  Args:
    workdir: made if missing.
    made: of `config`.
    params: on the host.

  Raises:
    ValueError: the workdir holds another run.
    StorageError: it cannot be written.
  """
  plain = build.plain(build.resolve(made))
  zero = np.zeros((), np.int32)
  about = {
    "config": plain,
    "fingerprint": _NO_DATA,
    "processes": 1,
    "batch_size": made.data.batch_size,
    "rows_consumed": 0,
    "train_seconds": 0.0,
    **environment.describe(),
  }
  with files.lock(workdir):
    files.claim(workdir, plain, _NO_DATA)
    with checkpoint.Checkpoints(workdir) as saver:
      state = {"params": params, "step": zero, "skipped": zero}
      saver.save(0, state, {}, about)
      saver.wait()
