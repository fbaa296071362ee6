"""From a config to the objects of a run; no ConfigDict goes further.

Everything that can be checked is checked here, before the first compile.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from nl_jax import data, fields, sharding
from nl_jax.data import sources, tokenizers
from nl_jax.eval import evaluate
from nl_jax.kernels import walk as kernels
from nl_jax.models import cms, lm, presets
from nl_jax.models.incontext import model as incontext
from nl_jax.train import checkpoint, files, optimizer, rules
from nl_jax.train import config as configs
from nl_jax.train import options as options_lib

Model = lm.LanguageModel | incontext.InContextModel


class Run(NamedTuple):
  """What a run has made, as `nl_jax.stream` takes it.

  Attributes:
    model: of its config.
    params: of its newest checkpoint that can be read.
    tokenizer: of its data.
    step: of the checkpoint.
    config: all of it.
  """

  model: Model
  params: Any
  tokenizer: tokenizers.Tokenizer
  step: int
  config: ConfigDict


def load(workdir: str | os.PathLike) -> Run:
  """Loads a run: model, parameters and tokenizer.

  Nothing in the workdir is changed.

  Args:
    workdir: of the run, as "runs/hope_tiny".

  Raises:
    ValueError: no run there, one whose config this version does not read, or
      no checkpoint that can be read.
    FileNotFoundError: its tokenizer is gone.
  """
  config, net = of_run(workdir)
  ids = tokenizer(config)
  params, step = checkpoint.load_params(os.fspath(workdir), net)
  return Run(net, params, ids, step, config)


def plain(config: ConfigDict) -> dict[str, Any]:
  """The config as nested dicts of JSON values; tuples become lists."""
  as_lists = lambda x: list(x) if isinstance(x, tuple) else x
  return jax.tree.map(
    as_lists, config.to_dict(), is_leaf=lambda x: not isinstance(x, dict)
  )


def from_plain(values: dict[str, Any]) -> ConfigDict:
  """The inverse of `plain`, for what a run left.

  Raises:
    ValueError: a field that nothing reads, one that is missing, or a value
      that its field does not take.
  """
  configs.check(values)
  as_tuples = lambda x: tuple(x) if isinstance(x, list) else x
  values = jax.tree.map(
    as_tuples, values, is_leaf=lambda x: not isinstance(x, dict)
  )
  return ConfigDict(values).lock()


def of_run(workdir: str | os.PathLike) -> tuple[ConfigDict, Model]:
  """The config of a run, and its model.

  Raises:
    ValueError: no run there, or one whose config this version does not read.
  """
  values = checkpoint.read_config(os.fspath(workdir))
  try:
    config = from_plain(values)
    return config, model(config)
  except ValueError as error:
    reason = " ".join(str(error).split())
    raise ValueError(
      f"{workdir}/{files.CONFIG} is not a config that this version of nl_jax "
      f"reads: {reason}; use the version that made the run, or a copy of the "
      "file as it was"
    ) from error


def tokenizer(config: ConfigDict) -> tokenizers.Tokenizer:
  """The tokenizer of the group `data`.

  Raises:
    ValueError, FileNotFoundError: what `tokenizers.load` raises.
  """
  values = config.data
  return tokenizers.load(
    values.tokenizer, bos=values.bos, special_tokens=values.special_tokens
  )


def resolve(config: ConfigDict) -> ConfigDict:
  """A config that is checked, with what depends on the machine filled in.

  Configs of earlier files get the fields that they do not list; groups of
  rules that are not chosen go, where they say nothing; what the machine decides
  is the dtype of activations.

  Raises:
    ValueError: as `from_plain`.
  """
  values = configs.upgraded(config.to_dict())
  values["optim"] = rules.chosen(values["optim"])
  known = configs.flat(configs.table_of(values))
  config = ConfigDict(from_plain(_split(values, known)).to_dict())
  if config.train.dtype == "auto":
    config.train.dtype = _dtype()
  return config.lock()


def _split(
  values: dict[str, Any], known: Mapping[str, fields.Field], prefix: str = ""
) -> dict[str, Any]:
  """Words that a command line gives as k,v, which reads as one, apart."""
  made = {}
  for key, value in values.items():
    field = known.get(prefix + key)
    if isinstance(value, dict):
      value = _split(value, known, f"{prefix}{key}.")
    elif field and field.many and field.words and isinstance(value, tuple):
      value = tuple(
        word
        for entry in value
        for word in (entry.split(",") if isinstance(entry, str) else [entry])
      )
    made[key] = value
  return made


def with_source(config: ConfigDict, is_given: bool) -> ConfigDict:
  """The config with `data.source` as `data.path` says it, if nothing else does.

  Args:
    config: of a training run.
    is_given: whether whoever starts the run gave the source.

  Raises:
    FileNotFoundError, ValueError: what `data.infer` raises.
  """
  takes_none = config.data.source in sources.WITHOUT_PATH and not is_given
  if not config.data.path or (config.data.source and not takes_none):
    return config
  config = ConfigDict(config.to_dict())
  config.data.source = data.infer(config.data.path)
  return config.lock()


def model(config: ConfigDict | str) -> Model:
  """The model of the groups `model`, `data` and `train`, or of a name.

  Its levels learn in context where `model.cms` says how.

  Args:
    config: resolved; or a name, as "hope_340m" (`presets.names` has all): then
      activations are bfloat16, on a CPU float32.

  Raises:
    ValueError: no such name, or shapes or switches that do not fit.
  """
  if isinstance(config, str):
    family, size = presets.parse(config)
    scale = presets.SCALES[size]
    return _model(
      presets.group(family, size),
      sequence_length=scale.sequence_length,
      dtype=_dtype(),
      remat=scale.remat,
    )
  return _model(
    config.model.to_dict(),
    sequence_length=config.data.sequence_length,
    dtype=config.train.dtype,
    remat=config.train.remat,
  )


def _model(group: Mapping[str, Any], **others: Any) -> Model:
  """The model of a group `model`, and of its fields that stand in others."""
  values = dict(group)
  mixer = lm.options(values["arch"], values.pop("mixer", None))
  names = {field.name for field in dataclasses.fields(incontext.Options)}
  levels = values.pop("cms")
  learning = {k: v for k, v in levels.items() if k in names}
  chain = {k: v for k, v in levels.items() if k not in names}
  base = lm.LanguageModel(
    **values, cms=cms.Options(**chain), mixer=mixer, **others
  )
  if not learning:
    return base
  return incontext.InContextModel(base, incontext.Options(**learning))


def _dtype() -> str:
  """Of activations, as the machine decides it."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def dataset(
  config: ConfigDict, net: lm.LanguageModel, on: jax.sharding.Mesh | None = None
) -> data.Dataset:
  """The data of the group `data`, with documents aligned to the chunks.

  Args:
    config: resolved.
    net: the model.
    on: the mesh, where this process is to draw what its devices hold; None:
      all rows.

  Raises:
    ValueError, FileNotFoundError: what `data.load` raises.
  """
  if not config.data.tokenizer:
    raise ValueError(
      "data.tokenizer is empty: give 'bytes', or the path of a SentencePiece "
      "model or a tokenizer.json, of at most model.vocab_size="
      f"{config.model.vocab_size} ids"
    )
  _check_rows(config, net)
  part, parts = (0, 1) if on is None else part_of_batch(on)
  return data.load(
    **config.data.to_dict(),
    consecutive=config.train.carry_gradient,
    alignment=net.alignment,
    vocab_size=net.vocab_size,
    process_index=part,
    process_count=parts,
  )


def _check_rows(config: ConfigDict, net: lm.LanguageModel) -> None:
  """Raises ValueError where rows cannot be carried on as the config says."""
  rows, reset = config.data.rows, config.data.reset
  if rows != "stream":
    for path, value, default in (
      ("data.reset", reset, "document"),
      ("train.carry_gradient", config.train.carry_gradient, 1),
    ):
      if value != default:
        raise ValueError(
          f"{path}={value!r} applies to data.rows=stream, got "
          f"data.rows={rows!r}"
        )
    return
  if net.grows:
    raise ValueError(
      "data.rows=stream carries what a model remembers from row to row, and "
      f"that of model.arch={net.arch!r} grows with the text: set "
      "model.mixer.window, or use a model of memories, such as hope"
    )
  levels = getattr(net, "options", None)
  if levels and (levels.reset == "document") != (reset == "document"):
    fits = {"document": "document", "never": "sequence"}[reset]
    raise ValueError(
      f"with data.rows=stream and data.reset={reset} levels in context need "
      f"model.cms.reset={fits}, got {levels.reset!r}"
    )


def streams(config: ConfigDict) -> int:
  """Rows that carry their memories from step to step; 0: none does."""
  if config.data.rows != "stream":
    return 0
  return config.data.batch_size // config.train.carry_gradient


def part_of_batch(on: jax.sharding.Mesh) -> tuple[int, int]:
  """Which part of a batch this process's devices hold, and of how many.

  Processes whose devices differ in `sequence` and `tensor` alone share a part.

  Raises:
    ValueError: the mesh cuts a batch unevenly over the processes.
  """
  shape = on.shape
  shards = on.devices.reshape(shape["replica"] * shape["fsdp"], -1)
  held: dict[int, set[int]] = {}
  for number, devices in enumerate(shards):
    for device in devices:
      held.setdefault(device.process_index, set()).add(number)
  parts = sorted({tuple(sorted(x)) for x in held.values()})
  lengths = {len(part) for part in parts}
  if len(lengths) > 1 or sum(map(len, parts)) != len(shards):
    raise ValueError(
      f"the mesh {dict(shape)} cuts a batch unevenly over {len(held)} "
      f"processes of {jax.local_device_count()} devices; make mesh.sequence * "
      "mesh.tensor a divisor or a multiple of the devices of a process"
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def gathered(params: Any) -> Any:
  """Parameters as a process can use them alone; all processes call it.

  Those of several processes are copied to each host, a leaf at a time.
  """
  if jax.process_count() == 1:
    return params
  return jax.tree.map(
    lambda x: multihost_utils.process_allgather(x, tiled=True), params
  )


def tokens_per_step(config: ConfigDict) -> int:
  """Tokens of a batch, padding included."""
  return config.data.batch_size * config.data.sequence_length


def make_optimizer(
  config: ConfigDict, net: lm.LanguageModel | incontext.InContextModel
) -> optimizer.Optimizer:
  """The optimizer of the group `optim`.

  Raises:
    ValueError: a value that does not fit, or that the rule does not read.
  """
  group = rules.chosen(config.optim.to_dict())
  own = group.pop(group["name"])
  return optimizer.make(
    net,
    **group,
    options=own,
    steps=config.train.steps,
    tokens_per_step=tokens_per_step(config),
  )


def mesh_sizes(config: ConfigDict, count: int) -> dict[str, int]:
  """Devices along each axis of the mesh, as the group `mesh` has them.

  A group that leaves open what a replica's devices do gets as much fsdp as the
  batch fills, and has them split tensors with the rest.

  Args:
    config: its groups mesh, data and train.
    count: devices.
  """
  sizes = config.mesh.to_dict()
  replica = sizes["replica"]
  axes = [sizes[axis] for axis in ("fsdp", "sequence", "tensor")]
  if axes != [-1, 1, 1] or replica < 1 or count % replica:
    return sizes
  rows = config.data.batch_size // config.train.carry_gradient
  rows //= config.train.accumulate * replica
  fsdp = math.gcd(count // replica, rows)
  return sizes | dict(fsdp=fsdp, tensor=count // replica // fsdp)


def mesh(
  config: ConfigDict, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """The mesh of the group `mesh`.

  Args:
    config: resolved.
    devices: all of them by default.

  Raises:
    ValueError: devices, heads or batch do not divide.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(config, len(devices))
  made = sharding.mesh(**sizes, devices=devices)
  tensor = made.shape["tensor"]
  if config.model.heads % tensor:
    raise ValueError(
      "model.heads must be a multiple of mesh.tensor, got "
      f"{config.model.heads} and {tensor} (mesh: {dict(made.shape)})"
    )
  sharding.check_batch(
    made,
    config.data.batch_size // config.train.carry_gradient,
    config.data.sequence_length,
    config.train.accumulate,
  )
  check_sequence(config, made.shape["sequence"])
  return made


def walks(config: ConfigDict, net: Model) -> list[kernels.Call]:
  """The walks over chunks of a layer in a training step, traced by shapes."""
  shape = config.data.batch_size, config.data.sequence_length
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
  run = lambda params, tokens: net.apply(params, tokens, segment_ids=tokens)
  with kernels.recorded() as calls:
    jax.eval_shape(run, jax.eval_shape(net.init, jax.random.key(0)), tokens)
  return calls


def walk_rows(calls: Iterable[kernels.Call]) -> list[dict[str, str | None]]:
  """Name, what ran it and why no kernel takes it, once for each walk."""
  found = {}
  for call in calls:
    shape = (call.slow, call.xs, call.places)
    why = kernels.supports(
      "pallas_interpret", *shape, state=call.state, chunk_free=call.chunk_free
    )
    if call.asked == "xla":
      why = "the layer names it"
    found[call.name] = dict(
      name=call.name, ran=call.implementation, refused=why,
      chunk=str(call.places.real.shape[-1]),
    )  # fmt: skip
  return list(found.values())


def check_sequence(config: ConfigDict, shards: int) -> None:
  """Raises ValueError unless rows of tokens can be split over devices.

  Args:
    config: resolved.
    shards: devices that a row is to be split over.
  """
  if shards == 1:
    return
  net, tokens = model(config), config.data.sequence_length
  if isinstance(net, incontext.InContextModel):
    raise ValueError(
      f"mesh.sequence={shards} splits the tokens of a row, but the levels of "
      "this model learn in context, from all tokens in order: set "
      "mesh.sequence=1 and use mesh.fsdp or mesh.tensor"
    )
  for call in walks(config, net):
    count, chunk = call.places.real.shape[1:]
    # A walk inside a chunk of another is not split.
    if count * chunk < tokens or tokens % (shards * chunk) == 0:
      continue
    part = shards * chunk
    sizes = [max(tokens // part, 1) * part, (tokens // part + 1) * part]
    fits = " or ".join(map(str, dict.fromkeys(sizes)))
    divisors = [n for n in range(1, shards) if tokens % (n * chunk) == 0]
    raise ValueError(
      f"mesh.sequence={shards} must give each device whole chunks of {chunk} "
      f"tokens (walk {call.name}), got data.sequence_length={tokens}; nearest: "
      f"data.sequence_length={fits}, or mesh.sequence="
      f"{', '.join(map(str, divisors)) or 1}"
    )


def options(config: ConfigDict) -> options_lib.Options:
  """What the loop does, and when.

  Raises:
    ValueError: a number out of range, or a task that there is not.
  """
  options_lib.EvalOptions(**config.eval.to_dict())
  try:
    evaluate.parse(config.eval.tasks)
  except ValueError as error:
    raise ValueError(f"eval.tasks: {error}") from error
  train = config.train
  return options_lib.Options(
    steps=train.steps,
    log_every=train.log_every,
    eval_every=train.eval_every,
    accumulate=train.accumulate,
    streams=streams(config),
    carry_gradient=train.carry_gradient,
    nan_policy=train.nan_policy,
    max_skipped=train.max_skipped,
    checkpoint_every=config.checkpoint.every,
    keep=config.checkpoint.keep,
    keep_period=config.checkpoint.keep_period,
    seed=train.seed,
    profile_steps=train.profile_steps,
  )
