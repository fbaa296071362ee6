"""The fields of a config, from the dataclasses and functions that read them.

A group of a config is what one or two of them take, with their defaults; a
preset states what differs. The checks of values, docs/config.md and what fills
the configs of earlier runs read the same table.
"""

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nl_jax import data, fields, sharding
from nl_jax.models import cms, lm
from nl_jax.models.incontext import model as incontext
from nl_jax.train import optimizer, rules
from nl_jax.train import options as options_lib

Field = fields.Field

_ARCHS = tuple(lm.MIXERS)
_SHAPE = ("arch", "width", "layers", "heads", "head_dim", "vocab_size",
          "tied", "norm_epsilon")  # fmt: skip
# Of `data.load`, what no config says.
_NOT_DATA = ("alignment", "vocab_size", "process_index", "process_count",
             "consecutive")  # fmt: skip
_OPTIM = ("name", "learning_rate", "warmup_steps", "weight_decay", "clip_norm",
          "min_ratio", "schedule", "cooldown_steps", "groups", "reduce",
          "nested_meta", "nested_rate")  # fmt: skip
_TRAIN = ("steps", "log_every", "eval_every", "accumulate", "carry_gradient",
          "dtype", "remat", "seed", "nan_policy", "max_skipped",
          "profile_steps")  # fmt: skip
_MESH = ("replica", "fsdp", "sequence", "tensor")
# What stands for the dtype of activations until the machine is known.
AUTO = "auto"
# Defaults of fields that earlier configs did not list, where they differ.
_WAS = {
  arch: {"model.mixer.beta_bias": math.log(9.0)} for arch in ("dla", "memora")
}


def table(
  arch: str, in_context: bool = False, names: Iterable[str] = rules.RULES
) -> dict[str, dict[str, Field]]:
  """The fields of every group by the group's path, in a config's order.

  Args:
    arch: a key of `lm.MIXERS`.
    in_context: whether its levels learn in context.
    names: rules of the optimizer whose groups there are: before a rule is
      chosen, all.

  Raises:
    ValueError: no such arch.
  """
  model = fields.of(lm.LanguageModel)
  fields.check_value("model.arch", model["arch"], arch)
  made = {"model": _chosen(model, _SHAPE)}
  made |= _nested("model.mixer", fields.of(lm.MIXERS[arch].Options))
  levels = fields.of(cms.Options)
  made["model.cms"] = levels | (
    fields.of(incontext.Options) if in_context else {}
  )
  made["data"] = _without(fields.of(data.load), _NOT_DATA)
  made["optim"] = _chosen(fields.of(optimizer.make), _OPTIM)
  made |= {f"optim.{name}": rules.options(name) for name in names}
  loop = fields.of(options_lib.Options)
  made["train"] = _chosen(loop | model | {"dtype": _dtype(model)}, _TRAIN)
  made["checkpoint"] = {
    key: loop[name]._replace(name=key)
    for key, name in options_lib.CHECKPOINT.items()
  }
  made["mesh"] = _chosen(fields.of(sharding.mesh), _MESH)
  made["eval"] = fields.of(options_lib.EvalOptions)
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
  known = flat(table_of(config))
  found = dict(leaves(config))
  for path in found:
    if path not in known:
      close = difflib.get_close_matches(path, known, n=1)
      hint = f"; did you mean {close[0]}?" if close else ""
      raise ValueError(f"nothing reads the field {path} of the config{hint}")
  for path, field in known.items():
    if path not in found:
      raise ValueError(f"the config has no field {path}: {field.said}")
    fields.check_value(path, field, found[path])


def upgraded(config: Any) -> Any:
  """A config of any format as this version writes it.

  In format 1 the group `model.mixer` was `model.memory`, the kind of a memory
  its field `arch`, and b1, b2 and eps of AdamW stood in `optim`. What a config
  does not list has the value that it had then. What is not a config stays as it
  is, for `check` to tell.
  """
  if not _has_groups(config) or config["model"].get("arch") not in _ARCHS:
    return config
  model = config["model"]
  config = {**config, "model": _renamed(model)}
  if config.get("optim"):
    config["optim"] = rules.upgraded(config["optim"])
  was = _WAS.get(model["arch"], {})
  for path, group in table_of(config).items():
    node = config
    for key in path.split("."):
      node[key] = dict(node.get(key) or {})
      node = node[key]
    for name, field in group.items():
      value = was.get(f"{path}.{name}", field.default)
      if field.group is None and value is not inspect.Parameter.empty:
        value = list(value) if isinstance(value, tuple) else value
        node.setdefault(name, value)
  return config


def _has_groups(config: Any) -> bool:
  """Whether what should be a group is one, as far as it is there."""
  group = lambda x: x is None or isinstance(x, Mapping)
  if not isinstance(config, Mapping) or not config.get("model"):
    return False
  parts = [*config.values(), config["model"]]
  if not all(map(group, parts)):
    return False
  return all(group(config["model"].get(x)) for x in ("memory", "mixer", "cms"))


def _renamed(model: Mapping[str, Any]) -> dict[str, Any]:
  """The group `model` in today's names."""
  made = {k: x for k, x in model.items() if k != "memory"}
  if "memory" in model:
    mixer = model["memory"] or {}
    made["mixer"] = {
      "memory" if k == "arch" else k: x for k, x in mixer.items()
    }
  return made


def table_of(config: Mapping[str, Any]) -> dict[str, dict[str, Field]]:
  """The fields of a config by its arch.

  Raises:
    ValueError: no group `model`, or no such arch.
  """
  model = config.get("model") if isinstance(config, Mapping) else None
  if not isinstance(model, Mapping):
    raise ValueError("the config has no group model")
  levels = model.get("cms")
  learns = isinstance(levels, Mapping) and "chunks" in levels
  said = config.get("optim")
  said = said if isinstance(said, Mapping) else {}
  chosen = said.get("name", rules.DEFAULT)
  names = [x for x in rules.RULES if x == chosen or x in said]
  return table(str(model.get("arch")), learns, names)


def leaves(
  config: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """Whole path and value of every field of a nested config."""
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _chosen(
  known: Mapping[str, Field], names: Iterable[str]
) -> dict[str, Field]:
  return {name: known[name] for name in names}


def _without(
  known: Mapping[str, Field], names: Iterable[str]
) -> dict[str, Field]:
  return {name: x for name, x in known.items() if name not in names}


def _nested(path: str, known: dict[str, Field]) -> dict[str, dict[str, Field]]:
  """A group, and those in it."""
  made = {path: known}
  for name, field in known.items():
    if field.group:
      made |= _nested(f"{path}.{name}", fields.of(field.group))
  return made


def _dtype(model: Mapping[str, Field]) -> Field:
  """Of activations; `build.resolve` puts another in the place of AUTO."""
  field = model["dtype"]
  remark = f"{field.remark} {AUTO}: bfloat16, on a CPU float32."
  return field._replace(
    default=AUTO, bounds=fields.OneOf(AUTO, *field.bounds), remark=remark
  )
