"""From a config to the objects of a run; no ConfigDict goes further.

Everything that can be checked is checked here, before the first compile.
"""

import dataclasses
from typing import Any

import jax
from ml_collections import config_dict

from nl_jax import data, sharding
from nl_jax.eval import evaluate
from nl_jax.models import cms, incontext, lm
from nl_jax.train import loop, optimizer

ConfigDict = config_dict.ConfigDict


def plain(config: ConfigDict) -> dict[str, Any]:
  """The config as nested dicts of JSON values; tuples become lists."""
  as_lists = lambda x: list(x) if isinstance(x, tuple) else x
  return jax.tree.map(
    as_lists, config.to_dict(), is_leaf=lambda x: not isinstance(x, dict)
  )


def from_plain(values: dict[str, Any]) -> ConfigDict:
  """The inverse of `plain`."""
  as_tuples = lambda x: tuple(x) if isinstance(x, list) else x
  values = jax.tree.map(
    as_tuples, values, is_leaf=lambda x: not isinstance(x, dict)
  )
  return ConfigDict(values).lock()


def resolve(config: ConfigDict) -> ConfigDict:
  """Fills in what depends on the machine: the dtype of activations."""
  config = config_dict.ConfigDict(config.to_dict())
  if config.train.dtype == "auto":
    on_cpu = jax.default_backend() == "cpu"
    config.train.dtype = "float32" if on_cpu else "bfloat16"
  return config.lock()


def model(
  config: ConfigDict,
) -> lm.LanguageModel | incontext.InContextModel:
  """The model of the groups `model`, `data` and `train`.

  Its levels learn in context where `model.cms` says how.

  Raises:
    ValueError: shapes or switches that do not fit.
  """
  values = config.model.to_dict()
  memory = lm.options(values["arch"], values.pop("memory", None))
  names = {field.name for field in dataclasses.fields(incontext.Options)}
  learning = {k: v for k, v in values["cms"].items() if k in names}
  chain = {k: v for k, v in values["cms"].items() if k not in names}
  base = lm.LanguageModel(
    **values | {"cms": cms.CMSConfig(**chain)},
    memory=memory,
    sequence_length=config.data.sequence_length,
    dtype=config.train.dtype,
    remat=config.train.remat,
  )
  if not learning:
    return base
  return incontext.InContextModel(base, incontext.Options(**learning))


def dataset(config: ConfigDict, net: lm.LanguageModel) -> data.Dataset:
  """The data of the group `data`, with documents aligned to the chunks.

  Raises:
    ValueError, FileNotFoundError: what `data.load` raises.
  """
  if not config.data.tokenizer:
    raise ValueError(
      "data.tokenizer is empty: give 'bytes', or the path of a SentencePiece "
      "model or a tokenizer.json, of at most model.vocab_size="
      f"{config.model.vocab_size} ids"
    )
  return data.load(
    **config.data.to_dict(),
    alignment=net.alignment,
    vocab_size=net.vocab_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def tokens_per_step(config: ConfigDict) -> int:
  """Tokens of a batch, padding included."""
  return config.data.batch_size * config.data.sequence_length


def make_optimizer(
  config: ConfigDict, net: lm.LanguageModel
) -> optimizer.Optimizer:
  """The optimizer of the group `optim`."""
  return optimizer.make(
    net,
    **config.optim.to_dict(),
    steps=config.train.steps,
    tokens_per_step=tokens_per_step(config),
  )


def mesh(config: ConfigDict) -> jax.sharding.Mesh:
  """The mesh of the group `mesh`; on one host, of devices the batch fills.

  Raises:
    ValueError: heads or batch do not divide.
  """
  sizes = config.mesh.to_dict()
  made = sharding.mesh(**sizes)
  tensor = made.shape["tensor"]
  if config.model.heads % tensor:
    raise ValueError(
      "model.heads must be a multiple of mesh.tensor, got "
      f"{config.model.heads} and {tensor}"
    )
  sharding.check_batch(
    made,
    config.data.batch_size,
    config.data.sequence_length,
    config.train.accumulate,
  )
  return made


def settings(config: ConfigDict) -> loop.Settings:
  """What the loop does, and when.

  Raises:
    ValueError: a number out of range, or a task that there is not.
  """
  try:
    evaluate.parse(config.eval.tasks)
  except ValueError as error:
    raise ValueError(f"eval.tasks: {error}") from error
  if config.eval.batches < 0:
    raise ValueError(
      f"eval.batches must be 0 (all) or more, got {config.eval.batches}"
    )
  train = config.train
  return loop.Settings(
    steps=train.steps,
    log_every=train.log_every,
    eval_every=train.eval_every,
    accumulate=train.accumulate,
    nan_policy=train.nan_policy,
    max_skipped=train.max_skipped,
    checkpoint_every=config.checkpoint.every,
    keep=config.checkpoint.keep,
    keep_period=config.checkpoint.keep_period,
    seed=train.seed,
  )
