"""The fields of a config, from the dataclasses and functions that read them.

A group of a config is what one or two of them take, with their defaults; a
preset states what differs. The checks of values and docs/config.md read the
same table.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from nl_jax import data, fields, sharding
from nl_jax.models import cms, incontext, lm
from nl_jax.train import optimizer, settings

ConfigDict = config_dict.ConfigDict
Field = fields.Field

_SHAPE = ("arch", "width", "layers", "heads", "head_dim", "vocab_size",
          "tied", "norm_epsilon")  # fmt: skip
_DATA = ("source", "path", "text_key", "tokenizer", "sequence_length",
         "batch_size", "seed")  # fmt: skip
_OPTIM = ("name", "learning_rate", "warmup_steps", "weight_decay", "clip_norm",
          "min_ratio", "b1", "b2", "eps", "reduce", "nested_meta",
          "nested_rate")  # fmt: skip
_TRAIN = ("steps", "log_every", "eval_every", "accumulate", "dtype", "remat",
          "seed", "nan_policy", "max_skipped", "profile_steps")  # fmt: skip
_MESH = ("replica", "fsdp", "sequence", "tensor")
# What the run's resolution puts in the place of `train.dtype`.
AUTO = "auto"


def filled(known: Mapping[str, Field], **says: Any) -> ConfigDict:
  """A group: what a preset says, and the defaults of the rest.

  Args:
    known: the fields of the group, of `table` or of `fields.of`.
    says: values by name; of a group in it a mapping of what differs.

  Raises:
    ValueError: a name that is no field of the group, or none for a field
      without a default.
  """
  group = ConfigDict()
  for name, field in known.items():
    if field.group:
      group[name] = filled(fields.of(field.group), **says.pop(name, {}))
      continue
    value = says.pop(name, field.default)
    if value is inspect.Parameter.empty:
      raise ValueError(f"a config must say {name}")
    group[name] = value
  if says:
    raise ValueError(
      f"no field {', '.join(says)}; there are {', '.join(known)}"
    )
  return group


def table(arch: str, in_context: bool = False) -> dict[str, dict[str, Field]]:
  """The fields of every group by the group's path, in a config's order.

  Args:
    arch: a key of `lm.MIXERS`.
    in_context: whether its levels learn in context.

  Raises:
    ValueError: no such arch.
  """
  model = fields.of(lm.LanguageModel)
  fields.check_value("model.arch", model["arch"], arch)
  made = {"model": _chosen(model, _SHAPE)}
  made |= _nested("model.mixer", fields.of(lm.MIXERS[arch].Options))
  levels = fields.of(cms.CMSConfig)
  made["model.cms"] = levels | (
    fields.of(incontext.Options) if in_context else {}
  )
  made["data"] = _chosen(fields.of(data.load), _DATA)
  made["optim"] = _chosen(fields.of(optimizer.make), _OPTIM)
  loop = fields.of(settings.Settings)
  made["train"] = _chosen(loop | model | {"dtype": _dtype(model)}, _TRAIN)
  made["checkpoint"] = {
    key: loop[name]._replace(name=key)
    for key, name in settings.CHECKPOINT.items()
  }
  made["mesh"] = _chosen(fields.of(sharding.mesh), _MESH)
  made["eval"] = fields.of(settings.Evaluation)
  return made


def flat(groups: Mapping[str, Mapping[str, Field]]) -> dict[str, Field]:
  """The fields of `table` by their whole path."""
  return {
    f"{path}.{name}": field
    for path, group in groups.items()
    for name, field in group.items()
    if field.group is None
  }


def check(config: Mapping[str, Any]) -> None:
  """Checks that a config has the fields of its arch, each in its range.

  Args:
    config: nested, by group.

  Raises:
    ValueError: a field too many, one that is missing, or a value that its
      field does not take; the sentence names the field.
  """
  model = config.get("model")
  if not isinstance(model, Mapping):
    raise ValueError(f"the config must have a group model, got {model!r}")
  levels = model.get("cms")
  in_context = isinstance(levels, Mapping) and "chunks" in levels
  known = flat(table(model.get("arch"), in_context))
  found = dict(leaves(config))
  for path in found:
    if path not in known:
      close = difflib.get_close_matches(path, known, n=1)
      hint = f"; did you mean {close[0]}?" if close else ""
      raise ValueError(f"nothing reads the field {path} of the config{hint}")
  for path, field in known.items():
    if path not in found:
      raise ValueError(f"the config must have the field {path}: {field.said}")
    fields.check_value(path, field, found[path])


def leaves(
  config: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _chosen(
  known: Mapping[str, Field], names: Iterable[str]
) -> dict[str, Field]:
  return {name: known[name] for name in names}


def _nested(path: str, known: dict[str, Field]) -> dict[str, dict[str, Field]]:
  """A group, and those in it."""
  made = {path: known}
  for name, field in known.items():
    if field.group:
      made |= _nested(f"{path}.{name}", fields.of(field.group))
  return made


def _dtype(model: Mapping[str, Field]) -> Field:
  """Of activations; `_setup.resolve` puts another in the place of AUTO."""
  field = model["dtype"]
  remark = f"{field.remark} {AUTO}: bfloat16, on a CPU float32."
  return field._replace(
    default=AUTO, bounds=fields.OneOf(AUTO, *field.bounds), remark=remark
  )
